"""The inference context of static batching over an expert-sharded store. B rows, T columns of a forward, H heads, D head_dim."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor, nn

from pikv_ds.cache import PiKVCache
from pikv_ds.config import PiKVConfig
from pikv_ds.digest import digest
from pikv_ds.errors import UnsupportedError
from pikv_ds.plan import LocalStep
from pikv_ds.stats import stats

from .chunk import finish_attention
from .expert_ids import ExpertIds
from .groups import expert_group, fit_requests
from .layers import Layer, Link, check_routers, find_layers, layer_spec_of
from .masks import refuse_other_than_causal
from .refusals import refuse_config, refuse_dtype, refuse_model
from .subclass import is_pikv


class PiKVInferenceContext(StaticInferenceContext):
    """Takes the place of StaticInferenceContext: PiKVInferenceContext(max_batch_size, max_sequence_length, model=model).

    The caller advances it as usual (increment_sequence_len_offset, reset, swap_key_value_dict). A sequence_len_offset of 0 starts new
    requests; a smaller one than was reached takes the later tokens back. All ranks of the expert-parallel group run the same number
    of forwards: a rank without work runs them under idle().
    """

    def __init__(
        self, max_batch_size: int, max_sequence_length: int, *, model: nn.Module, config=None, group: dist.ProcessGroup | None = None
    ) -> None:
        """
        Args:
            max_batch_size, max_sequence_length: limits as in StaticInferenceContext; nothing is allocated for them.
            model: enabled by enable_pikv, or built from a pikv_layer_spec.
            config: the "pikv" block; None = the one the model was enabled with.
            group: None = the model's expert-parallel group.

        Collectives: none.
        """
        super().__init__(max_batch_size, max_sequence_length)
        self.key_value_memory_dict = _NoDenseCache()
        layers = find_layers(model)
        for layer in layers:
            if not is_pikv(layer.attention):
                raise UnsupportedError(f"layer {layer.attention.layer_number} of {type(model).__name__} is not enabled for PiKV; call enable_pikv(model) first")
        refuse_model(model, layers[0].attention.config)
        config = layers[0].attention.pikv_config if config is None else PiKVConfig.parse(config)
        refuse_config(config)
        check_routers(layers, config.storage.expert_ids)
        group = expert_group(layers) if group is None else group
        config = fit_requests(config, layers, group)
        weight = layers[0].attention.linear_qkv.weight
        refuse_dtype(weight.dtype)
        num_shards = config.storage.num_shards or (1 if group is None else group.size())
        num_experts = layers[0].attention.config.num_moe_experts or num_shards
        specs = [layer_spec_of(layer, i) for i, layer in enumerate(layers)]
        self.core = PiKVCache(specs, config, num_experts=num_experts, dtype=weight.dtype, device=weight.device, group=group)
        self.layers = layers
        self.expert_ids = ExpertIds(config.storage.expert_ids, self.core, num_experts)
        self._layer_of = {layer.attention.layer_number: i for i, layer in enumerate(layers)}
        self._links = _link(layers)
        self._idle = False
        self._next_layer: int | None = None  # while a forward runs: the layer whose attention comes next
        self._begin_generation()

    # ---- the caller's controls -----------------------------------------------------------------------------------------------

    def stats(self) -> dict:
        """Plain numbers of this rank, see pikv_ds.stats.stats. Sync: reads the device. Needs no other rank."""
        return stats(self.core, len(self.rows), self.columns)

    def reset(self) -> None:
        """The next forward starts new requests; the old ones' memory returns when it does. Local: ranks may reset at different times."""
        super().reset()
        self._begin_generation()

    def free(self) -> None:
        """reset(), and return all memory now. All ranks of the group must call it at the same point."""
        self.reset()
        self.core.reset()

    @contextlib.contextmanager
    def idle(self) -> Iterator[None]:
        """Forwards of one column inside store nothing, and their output means nothing: for a rank that only keeps step with the others."""
        self._idle = True
        try:
            yield
        finally:
            self._idle = False

    def swap_key_value_dict(self, batch_idx) -> None:
        """Row i continues row batch_idx[i] from the next forward on (beam search)."""
        if not self.rows:
            raise ValueError("swap_key_value_dict: nothing is stored yet; run a forward first")
        index = [int(i) for i in batch_idx]
        self.rows = [self.rows[i] for i in index]
        self._rows_moved = True

    # ---- called by the layers ------------------------------------------------------------------------------------------------

    def rotary_range(self, columns: int) -> tuple[int, int]:
        """Which rows of the rotary table belong to this forward's columns."""
        start = 0 if self._idle else self.sequence_len_offset
        self._check_length(start + columns)  # a slice beyond the table would be silently short
        return start, start + columns

    def attend(self, layer_number: int, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Attention of one layer, exact. query [T, B, Hq, D], key and value [T, B, Hkv, D], rotated. Returns [T, B, Hq * D]."""
        layer = self._layer_of[layer_number]
        if layer == 0:
            self._begin(key, attention_mask)
        elif layer != self._next_layer:
            raise UnsupportedError(f"attention of layer {layer_number} ran out of order; PiKV needs every attention layer once per forward, in order")
        attention, spec = self.layers[layer].attention, self.core.layers[layer]
        if key.dtype != self.core.dtype:
            raise UnsupportedError(f"layer {layer_number}: keys arrive as {key.dtype}, the parameters are {self.core.dtype} (autocast?); run without autocast")
        q, k, v = (t.detach().transpose(0, 1) for t in (query, key, value))
        scale = attention.config.softmax_scale or spec.k_dim**-0.5
        partial = self.core.attend(layer, q, k, v, scale=scale, v_dim=spec.v_dim, expert_ids=self.expert_ids.of())
        out = finish_attention(partial, q, k, v, scale=scale, window=spec.window, sink=_sink(attention))
        self._next_layer = layer + 1
        if self._next_layer == len(self.layers) and not (self.core.stages and self._links[layer] is not None):
            self._finish()
        return out.transpose(0, 1).flatten(2).to(query.dtype)

    def note_routing(self, layer: int, ids: Tensor) -> None:
        """A router has run: ids [tokens] int64, -1 = dropped. It may be called several times per layer."""
        if self._next_layer is None:  # the forward's last attention was the end of it
            return
        complete = self.expert_ids.note(layer, ids)
        if complete and self._next_layer == len(self.layers):
            self._finish()

    # ---- one forward ---------------------------------------------------------------------------------------------------------

    def _begin_generation(self) -> None:
        self.columns = 0  # tokens stored per row
        self.rows: list[int] = []  # per row, the row of the last forward that it continues
        self._rows_moved = False

    def _begin(self, key: Tensor, attention_mask: Tensor | None) -> None:
        columns, rows = key.shape[:2]
        offset = self.sequence_len_offset
        self._check(rows, columns, offset)
        if not self._idle:
            refuse_other_than_causal(attention_mask, columns, offset)
            if offset == 0:
                self._begin_generation()
        fresh = not self.rows
        at = torch.arange(offset, offset + columns, dtype=torch.int32) if not self._idle else torch.full((columns,), -1, dtype=torch.int32)
        positions = at.repeat(rows, 1).to(self.core.device)
        keep = self.columns if self._idle else offset
        value = 0
        if self.core.exchange.size > 1 and (fresh or self.core.agreement.mode == "replicated"):
            value = digest([key, positions])  # keys of the first layer are a function of token and position alone
        self._next_layer = 0
        self.expert_ids.begin(positions)
        self.core.begin_step(LocalStep(
            num_rows=rows, num_columns=columns, num_new=[0 if self._idle else columns] * rows,
            parent=[-1] * rows if fresh else list(self.rows), keep=[0 if fresh else keep] * rows, positions=positions, digest=value,
            identity=not fresh and not self._rows_moved and keep == self.columns, fresh=fresh,
        ))
        self._after = (rows, keep if self._idle else offset + columns)

    def _check(self, rows: int, columns: int, offset: int) -> None:
        if self._next_layer is not None and offset > 0:
            raise RuntimeError("an earlier forward failed midway, so the layers hold different tokens; call reset() and start the requests again")
        self._check_length(columns if self._idle else offset + columns)
        if rows > self.max_batch_size:
            raise ValueError(f"a forward of {rows} rows exceeds max_batch_size = {self.max_batch_size}; build the context with a larger limit")
        if self.batch_size_offset:
            raise UnsupportedError(f"batch_size_offset = {self.batch_size_offset}: a batch in parts (pipeline micro-batches) is not supported; set "
                                   f"inference_batch_times_seqlen_threshold = -1")
        if self._idle:
            if columns != 1 or (self.rows and rows != len(self.rows)):
                raise UnsupportedError(f"an idle forward has one token per row and the rows of the last one ({len(self.rows) or 'any'}); got {rows} rows x {columns}")
        elif offset > self.columns:
            raise UnsupportedError(f"sequence_len_offset = {offset}, but {self.columns} tokens per row are stored: tokens in between were never run")
        elif offset and rows != len(self.rows):
            raise UnsupportedError(f"the forward has {rows} rows, {len(self.rows)} are stored; call swap_key_value_dict to choose rows, or reset()")

    def _check_length(self, length: int) -> None:
        if length > self.max_sequence_length:
            raise ValueError(f"a forward up to token {length} exceeds max_sequence_length = {self.max_sequence_length}; build the context with a larger limit")

    def _finish(self) -> None:
        self._next_layer = None
        for link in self._links:
            if link is not None:
                link.context = None
        self.core.end_step()
        rows, self.columns = self._after
        self.rows, self._rows_moved = list(range(rows)), False


class _NoDenseCache(dict):
    """Stands where Megatron keeps its dense buffers: whoever allocates one has not been replaced, and stops here."""

    def __setitem__(self, key, value) -> None:
        raise UnsupportedError(
            f"layer {key} allocates a dense cache in a PiKVInferenceContext: that layer is not enabled for PiKV; call enable_pikv(model) on "
            f"the model this context is used with"
        )


def _link(layers: list[Layer]) -> list[Link | None]:
    """One Link per layer with a PiKV router, shared by all contexts of the model."""
    links = []
    for i, layer in enumerate(layers):
        has_router = layer.router is not None and is_pikv(layer.router)
        if has_router and layer.attention.pikv_link is None:
            layer.attention.pikv_link = layer.router.pikv_link = Link(i)
        links.append(layer.attention.pikv_link if has_router else None)
    return links


def _sink(attention: nn.Module) -> Tensor | None:
    """The logit per head that takes a share of the softmax and gives nothing: TransformerConfig.softmax_type."""
    kind, offset = attention.config.softmax_type, getattr(attention.core_attention, "softmax_offset", None)
    if kind == "vanilla":
        return None
    if offset is None:
        raise UnsupportedError(f"softmax_type = {kind!r}, but {type(attention.core_attention).__name__} has no softmax_offset to take it from")
    return offset.flatten()

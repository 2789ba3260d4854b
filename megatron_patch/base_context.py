"""What the contexts of static and dynamic batching share: the cache of a model, and the calls its layers make during a forward."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pikv_ds.adapters.penalty import penalty_of
from pikv_ds.blueprint.routing import check_has_experts
from pikv_ds.cache.cache import PiKVCache
from pikv_ds.cache.chunk import finish
from pikv_ds.cache.gradient import is_recorded, with_gradient
from pikv_ds.cache.stats import stats
from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.errors import UnsupportedError
from pikv_ds.exchange.digest import digest_there
from pikv_ds.modes import eager

from .expert_ids import ExpertIds
from .experts import experts_of
from .groups import expert_group, fit_requests
from .heads import stored_heads
from .layers import check_calibration, check_routers, connect, find_layers, is_later_stage, layer_spec_of, softmax_offset
from .penalty import RouterPenalty, check_installed
from .refusals import refuse_config, refuse_dtype, refuse_model
from .subclass import is_pikv
from .tokens import Tokens

_OF_MODEL = ("core", "layers", "links", "heads", "expert_ids")


class PiKVContext(ABC):
    """Owns the PiKVCache of one model. A subclass says what a forward brings, and keeps what it needs to say that."""

    dynamic = False
    has_model = False

    @eager
    def bind(self, model: nn.Module, config=None, group: dist.ProcessGroup | None = None) -> None:
        """Give a context that was made without one its model, once; arguments as in its constructor. Collectives: none."""
        if self.has_model:
            raise UnsupportedError(f"this {type(self).__name__} has its model already; make one context for each model")
        self._open(model, config, group)
        self.has_model = True

    def __getattr__(self, name: str):
        if name in _OF_MODEL and not self.has_model:
            raise UnsupportedError(
                f"this {type(self).__name__} has no model yet: pass model=, call bind(model), or leave it to install(), which does "
                f"that when the model is wrapped for inference"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _open(self, model: nn.Module, config, group: dist.ProcessGroup | None) -> None:
        """Build the cache."""
        self.layers = find_layers(model)
        for layer in self.layers:
            if not is_pikv(layer.attention):
                raise UnsupportedError(
                    f"layer {layer.attention.layer_number} of {type(model).__name__} is not enabled for PiKV; call enable_pikv(model) first"
                )
        attention = self.layers[0].attention
        refuse_model(model, attention.config)
        config = attention.pikv_config if config is None else PiKVConfig.parse(config)
        refuse_config(config)
        check_routers(self.layers, config.storage.expert_ids)
        group = expert_group(self.layers) if group is None else group
        self.later_stage = is_later_stage(model)
        config, self.shared = fit_requests(config, self.layers, group, self.dynamic, self.later_stage)
        weight = attention.linear_proj.weight
        refuse_dtype(weight.dtype)
        num_shards = config.storage.num_shards or (1 if group is None else group.size())
        check_installed(config, attention.config, [layer.router for layer in self.layers])
        num_experts = attention.config.num_moe_experts or num_shards
        specs = [layer_spec_of(layer, i, self.shared is not None) for i, layer in enumerate(self.layers)]
        experts = experts_of(self.layers, config, group)
        holders = None if isinstance(experts, str) else experts.holders(num_shards)
        self.core = PiKVCache(
            specs, config, num_experts=num_experts, dtype=weight.dtype, device=weight.device, group=group, holders=holders
        )
        self.core.follow(experts)
        check_has_experts(self.core.blueprint.router, attention.config.num_moe_experts, type(model).__name__)
        check_calibration(self.core, self.layers)
        self.heads = [stored_heads(layer.attention, self.core, i, self.shared) for i, layer in enumerate(self.layers)]
        self.expert_ids = ExpertIds(config.storage.expert_ids, self.core, num_experts)
        self.links = connect(self.layers, config.storage.expert_ids)
        self._layer_of = {layer.attention.layer_number: i for i, layer in enumerate(self.layers)}
        self._next_layer: int | None = None  # while a forward runs: the layer whose attention comes next
        self._idle = False
        # Rows of their own: a host that suspends its context deletes the tensors that are its attributes.
        self._misses = list(torch.zeros(len(self.layers), num_experts, dtype=torch.float32, device=weight.device))

    # ---- the caller's controls -----------------------------------------------------------------------------------------------

    @eager
    def free(self) -> None:
        """reset(), and return all memory now. All ranks of the group must call it at the same point."""
        self.reset()
        self._forget()

    def _forget(self) -> None:
        """What free() does beside the host's own reset()."""
        self.core.reset()
        self.tokens = self._after = None
        self.expert_ids.begin(None)

    def rebalance(
        self,
        holders: Sequence[Sequence[int]] | None = None,
        *,
        bytes_per_step: int | None = None,
        experts: bool | None = None,
        optimizer=None,
    ) -> bool:
        """Move shards with their entries to other ranks, and the model's experts with them, in all its MoE layers. Between two forwards.

        holders, bytes_per_step: as in PiKVCache.rebalance. experts: None = where they can move; True = a UnsupportedError says why not;
        False = entries alone. optimizer: what trains the model, Megatron-Core's or torch's, several in a list, () = nothing: its state
        moves with the experts, and it is remembered. A model with gradients moves none without.
        All ranks of the expert-parallel group at the same point, alike. Returns whether something moves.
        """
        if optimizer is not None:
            for along in self.core.moves_along:
                along.store.train_with(optimizer)
        return self.core.rebalance(holders, bytes_per_step=bytes_per_step, experts=experts)

    def cancel_rebalance(self) -> None:
        """A move beside the forwards does not take place. All ranks at the same point."""
        self.core.cancel_rebalance()

    @contextlib.contextmanager
    def idle(self) -> Iterator[None]:
        """Forwards inside store nothing, with or without this context, of any shape; their output means nothing."""
        self._idle = True
        try:
            with self.serving():
                yield
        finally:
            self._idle = False

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Inside, an eval-mode forward *without* a context is a dummy_forward: this rank has no work and joins with zero queries.

        Megatron's dynamic engine runs such forwards on idle expert-parallel ranks. Outside, they are the host's own.
        """
        for link in self.links:
            link.serving = self
        try:
            yield
        finally:
            for link in self.links:
                link.serving = None

    def add_misses(self, layer: int, misses: Tensor) -> None:
        """Count entries of a layer that had to be fetched, per expert [E]; for RouterPenalty.miss. The same numbers on all ranks."""
        self._misses[layer] += misses.to(self._misses[layer])

    def router_penalty(self, layer: int, penalty: RouterPenalty) -> Tensor:
        """[E] f32, what the router of a layer takes off its logits."""
        return penalty_of(penalty, self.core, layer, self._misses)

    def _stats(self, num_rows: int, context: int) -> dict:
        return stats(self.core, num_rows, context)

    # ---- called by the layers ------------------------------------------------------------------------------------------------

    @abstractmethod
    def rotary_rows(self, columns: int) -> slice | Tensor | None:
        """Rows of the rotary table for this forward's tokens; None when they need no rotation."""

    @abstractmethod
    def begin_forward(self, key: Tensor, attention_mask: Tensor | None, idle: bool) -> Tokens:
        """Check what the forward brings, announce it to the cache, return how its tokens lie."""

    @abstractmethod
    def end_forward(self) -> None:
        """The cache has taken in the forward."""

    def attend(
        self,
        layer_number: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        *,
        latent: Tensor | None = None,
        looked_ahead: Tensor | None = None,
        idle: bool = False,
    ) -> Tensor:
        """Attention of one layer, exact, over what is stored and the forward's own tokens. Forward only: a backward is refused.

        Args: query, key, value in the host's layout [T, B, H, D] (dynamic: [N, 1, H, D]), rotated; latent [T, B, R] of MLA, else None;
            looked_ahead [tokens] int64 expert ids of the layer's router, or None; idle: store nothing, the result means nothing.
        Returns: [T, B, Hq, Dv] in the query's dtype.
        """
        out = self._attend(layer_number, query, key, value, mask, latent, looked_ahead, idle)
        if is_recorded(query, key, value):
            out = with_gradient(
                out, None, "an inference context keeps no graph; train without a context, or detach the loss", query, key, value
            )
        return out

    @eager
    def _attend(self, layer_number: int, query: Tensor, key: Tensor, value: Tensor, mask, latent, looked_ahead, idle: bool) -> Tensor:
        layer = self._layer_of[layer_number]
        if layer == 0:
            self.tokens = self.begin_forward(key, mask, idle or self._idle)
            self.expert_ids.begin(self.tokens)
            self._next_layer = 0
        if layer != self._next_layer:
            raise UnsupportedError(
                f"attention of layer {layer_number} ran out of order; PiKV needs every attention layer once per forward, in order"
            )
        if key.dtype != self.core.dtype:
            raise UnsupportedError(
                f"layer {layer_number}: keys arrive as {key.dtype}, the parameters are {self.core.dtype} (autocast?); run without autocast"
            )
        q, k, v = (self.tokens.rows(t.detach()) for t in (query, key, value))
        heads = self.heads[layer]
        latent = None if latent is None else self.tokens.rows(latent.detach())
        partial = heads.attend(q, k, v, latent, self.expert_ids.of(layer, looked_ahead))
        out = finish(
            partial, *(t.transpose(1, 2) for t in (q, k, v)), scale=heads.scale, window=self.core.layers[layer].window,
            hidden=self.tokens.padding, sink=softmax_offset(self.layers[layer].attention),
        )  # fmt: skip
        self._next_layer = layer + 1
        if self._next_layer == len(self.layers) and not (self.expert_ids.source == "true" and self.links[layer].router is not None):
            self._finish()
        return self.tokens.host(out).to(query.dtype)

    @eager
    def note_routing(self, layer: int, ids: Tensor) -> None:
        """A router has run: ids [tokens] int64, -1 = dropped. It may be called several times per layer."""
        if self._next_layer is None:  # the forward's last attention was the end of it
            return
        complete = self.expert_ids.note(layer, ids)
        if complete and self._next_layer == len(self.layers):
            self._finish()

    def _finish(self) -> None:
        self._next_layer = None
        for link in self.links:
            link.context = None
        self.core.end_step()
        self.end_forward()

    def _refuse_after_failure(self, continues: bool) -> None:
        if self._next_layer is not None and continues:
            raise RuntimeError(
                "an earlier forward failed midway, so the layers hold different tokens; call reset() and start the requests again"
            )


def positions_digest(core: PiKVCache, shared: bool, key: Tensor, positions: Tensor) -> int | Tensor:
    """What replicated ranks compare. Keys of the first layer are a function of token and position alone; tensor-parallel peers see the same
    tokens by construction, and compute a shared KV head in GEMMs of their own, so theirs are not compared bit by bit, nor are those of a
    later pipeline stage."""
    return 0 if core.ranks.size == 1 else digest_there([positions] if shared else [key, positions], [])


def check_length(length: int, limit: int) -> None:
    if length > limit:
        raise ValueError(f"a forward up to token {length} exceeds max_sequence_length = {limit}; build the context with a larger limit")

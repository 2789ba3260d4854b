"""The inference context of dynamic batching over an expert-sharded store: requests of different lengths that come, pause and go."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pikv_ds.errors import UnsupportedError
from pikv_ds.modes import eager
from pikv_ds.step.step import LocalStep

from .base_context import PiKVContext, positions_digest
from .blocks import CountedBlocks, refuse_options
from .layers import is_latent
from .tokens import Nothing, Packed, Piece, Tokens
from .version import check_feature

_NOBODY = -1  # the row of a rank that has no request: the host's own sign for an empty place


class PiKVDynamicInferenceContext(PiKVContext, CountedBlocks):
    """Takes the place of DynamicInferenceContext: the same arguments and `model=`. Requests, blocks and their budget are the host's.

    A block is a promise here: it is counted as the host counts it, so that requests wait, pause and are evicted alike, but no memory
    stands behind it. Entries lie in the pages of all ranks of the expert-parallel group, and follow their request by its id.
    All ranks run the same number of forwards: those without work run the dummy_forward() of wrapper or controller under serving(), or any
    forward under idle().
    """

    dynamic = True
    sequence_len_offset = 0  # what the host's static path begins its rotations at, see latent_attention.py
    _as_static = False

    @eager
    def __init__(self, *args, model: nn.Module | None = None, config=None, group: dist.ProcessGroup | None = None, **options) -> None:
        """
        Args:
            args, options: as DynamicInferenceContext (0.16: keywords; from 0.17 on: model_config, inference_config); without CUDA graphs,
                flashinfer's fused rope, Mamba states, prefix caching and speculation. cache_mla_latent says how wide an entry of a model
                with MLA is, so how many tokens a block of the budget holds.
            model: enabled by enable_pikv, or built from a pikv_layer_spec; None = bind(model) follows.
            config: the "pikv" block; None = the one the model was enabled with.
            group: None = the model's expert-parallel group.

        Collectives: none.
        """
        check_feature("dynamic batching")
        refuse_options(args, options)
        super().__init__(*args, **options)
        self.use_flashinfer_fused_rope = False  # None, which scripts pass, means "if it is there"
        self._stored: dict[int, int] | None = None  # request id -> tokens stored, in the order of the cache's rows; None = no forward yet
        if model is not None:
            self.bind(model, config, group)
        elif config is not None or group is not None:
            raise UnsupportedError("config and group go with model: give all of them here, or all of them to bind()")

    def _open(self, model: nn.Module, config, group: dist.ProcessGroup | None) -> None:
        super()._open(model, config, group)
        if getattr(self, "cache_mla_latent", False) and not is_latent(self.layers[0].attention):
            raise UnsupportedError(
                f"cache_mla_latent = True, but {type(model).__name__} has no multi-latent attention: its blocks would be counted too small"
            )

    # ---- the caller's controls -----------------------------------------------------------------------------------------------

    def stats(self) -> dict:
        """Plain numbers of this rank, see pikv_ds.cache.stats.stats; kv_bytes_dense = the blocks in use. Sync: reads the device."""
        return self._stats(0, 0) | {"kv_bytes_dense": self.blocks.get_total_used() * self.block_size_bytes}

    @eager
    def reset(self, *args, **kwargs) -> None:
        """No request is left; their memory returns with the next forward. Local: ranks may reset at different times.

        args, kwargs: of the host's reset, from 0.19 on: what it keeps of its own counters.
        """
        super().reset(*args, **kwargs)
        if self._stored is not None:
            self._stored = {}

    def _forget(self) -> None:
        super()._forget()
        self._stored = None

    @eager
    def deallocate_inference_state_buffers(self) -> None:
        """Of engines from 0.17 on that are suspended, all ranks between the same two forwards: requests that will run again from their
        first token (kv_cache_management_mode "recompute") leave no memory behind; with "persist" they go on where they stopped."""
        super().deallocate_inference_state_buffers()
        if self.has_model and self.kv_cache_management_mode == "recompute":
            self._forget()

    def is_static_batching(self) -> bool:
        return self._as_static

    @contextlib.contextmanager
    def as_static(self) -> Iterator[None]:
        """Inside, the host takes this for a context of static batching: one layer's multi-latent attention does."""
        self._as_static = True
        try:
            yield
        finally:
            self._as_static = False

    def append_key_value_cache(self, layer_number: int, key: Tensor, value: Tensor) -> None:
        raise UnsupportedError(
            f"layer {layer_number} appends to the block buffer of a PiKVDynamicInferenceContext: that layer is not enabled for PiKV; call "
            f"enable_pikv(model) on the model this context is used with"
        )

    # ---- one forward ---------------------------------------------------------------------------------------------------------

    def rotary_rows(self, columns: int) -> Tensor | None:
        if self._idle:
            return None
        if columns != self.padded_active_token_count:
            raise UnsupportedError(
                f"a forward of {columns} tokens, but the context has laid out {self.padded_active_token_count}; call "
                f"initialize_attention_state() and pass current_input_and_position_ids(), or run the forward under idle()"
            )
        return self.positions[:columns]

    def begin_forward(self, key: Tensor, attention_mask: Tensor | None, idle: bool) -> Tokens:
        """Sync: reads the host's request table back, once per forward."""
        stored, idle = self._stored or {}, idle or self.dummy_step
        self._refuse_after_failure(bool(stored))
        pieces = {} if idle else self._active()
        waiting = stored if idle else self.request_ids[: self.paused_request_count].tolist()
        before = {request: count for request, count in stored.items() if request in pieces or request in waiting}
        after = before | {request: start + length for request, (start, length) in pieces.items()} or {_NOBODY: 0}
        old_row, row = {r: i for i, r in enumerate(stored)}, {r: i for i, r in enumerate(after)}
        keep = {request: pieces[request][0] if request in pieces else before.get(request, 0) for request in after}
        if pieces:
            tokens: Tokens = Packed([Piece(row[r], *piece) for r, piece in pieces.items()], len(after), key.shape[0], self.core.device)
        else:
            tokens = Nothing(len(after), key.shape[:2], self.core.device)
        fresh, replicated = self._stored is None, self.core.replicated
        self.core.begin_step(
            LocalStep(
                num_rows=len(after),
                num_columns=tokens.positions.shape[1],
                num_new=[pieces[r][1] if r in pieces else 0 for r in after],
                parent=[old_row.get(r, -1) for r in after],
                keep=list(keep.values()),
                positions=tokens.positions,
                fresh=fresh,
                identity=list(keep.items()) == list(stored.items()),
                aligned=True,
                digest=positions_digest(self.core, True, key, tokens.positions) if fresh or replicated else 0,
            )
        )
        self._after = after
        return tokens

    def end_forward(self) -> None:
        self._stored = self._after

    def _active(self) -> dict[int, tuple[int, int]]:
        """Per active request, in the host's order: position of its first token in this forward, number of tokens."""
        active = slice(self.paused_request_count, self.total_request_count)
        table = torch.stack([t[active] for t in (self.request_ids, self.request_kv_length_offsets, self.request_query_lengths)], 1)
        pieces = {request: (start, length) for request, start, length in table.tolist()}
        for request, (start, _) in pieces.items():
            held = (self._stored or {}).get(request, 0)
            if start > held:
                raise UnsupportedError(
                    f"request {request} continues at token {start}, but {held} of its tokens are stored: tokens in between were never run "
                    f"through this context"
                )
        return pieces

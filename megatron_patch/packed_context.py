"""Continuous batching without the host's block tables: the caller names the requests of each forward, which come and go as it likes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor, nn

from pikv_ds.errors import UnsupportedError
from pikv_ds.modes import eager
from pikv_ds.step.step import LocalStep

from .base_context import PiKVContext, check_length, positions_digest
from .layers import is_latent
from .tokens import Nothing, Packed, Piece, Tokens


class PiKVPackedContext(PiKVContext, StaticInferenceContext):
    """A forward of [1, N] tokens, one request after the other. To the host it is a batch of one.

    with context.packed(parent=[0, -1], keep=[7, 0], new=[1, 3]) as positions:
        model(tokens, positions, None, inference_context=context)

    All ranks of the expert-parallel group run the same number of forwards; one without requests gives empty lists and one token.
    """

    dynamic = True

    @eager
    def __init__(self, max_sequence_length: int, *, model: nn.Module, config=None, group: dist.ProcessGroup | None = None) -> None:
        """
        Args:
            max_sequence_length: of a request; nothing is allocated for it.
            model: enabled by enable_pikv, or built from a pikv_layer_spec. config, group: as for PiKVInferenceContext.

        Raises: UnsupportedError for MLA, whose keys the host rotates by their place in the batch.
        """
        super().__init__(1, max_sequence_length)
        self.materialize_only_last_token_logits = False
        self._open(model, config, group)
        if any(is_latent(layer.attention) for layer in self.layers):
            raise UnsupportedError(
                "MLA in a packed forward: Megatron-Core rotates its keys by their place in the batch; use static batching "
                "(PiKVInferenceContext)"
            )
        self.lens: list[int] | None = None
        """Tokens of every row that is held; None: no forward yet."""
        self._given: tuple[list[int], list[int], list[int], list[int]] | None = None

    def stats(self) -> dict:
        """Plain numbers of this rank, see pikv_ds.cache.stats.stats. Sync: reads the device. Needs no other rank."""
        lens = self.lens or []
        return self._stats(len(lens), max(lens, default=0))

    @eager
    def reset(self) -> None:
        """No row is left; their memory returns with the next forward. Local."""
        super().reset()
        if getattr(self, "lens", None) is not None:
            self.lens = []

    @contextmanager
    def packed(self, parent: list[int], keep: list[int], new: list[int], prompt: Sequence[int] = ()) -> Iterator[Tensor]:
        """What the forward inside brings, per row: the row of the last forward that it continues (-1: it is new), how many tokens of it
        stay, how many come; tokens of its prompt where more of it comes, else 0 (scheduling.prefill "auto"; empty: of no row). Rows that
        are not named are dropped. Gives position_ids [1, N] int64; N = 1 where nothing comes."""
        held = self.lens or []
        for row, (source, kept) in enumerate(zip(parent, keep, strict=True)):
            if source >= len(held) or kept > (held[source] if source >= 0 else 0):
                raise UnsupportedError(f"row {row} keeps {kept} tokens of row {source}; the rows held have {held}")
        check_length(max((kept + more for kept, more in zip(keep, new, strict=True)), default=0), self.max_sequence_length)
        self._given = (list(parent), list(keep), list(new), list(prompt))
        positions = [torch.arange(kept, kept + more) for kept, more in zip(keep, new, strict=True)]
        self._positions = torch.cat(positions) if sum(new) else torch.zeros(1, dtype=torch.int64)
        self._positions = self._positions.to(self.core.device)
        try:
            yield self._positions[None]
        finally:
            self._given = None

    # ---- one forward ---------------------------------------------------------------------------------------------------------

    def rotary_rows(self, columns: int) -> Tensor | None:
        return self._positions

    def begin_forward(self, key: Tensor, attention_mask: Tensor | None, idle: bool) -> Tokens:
        """Sync: none."""
        if self._given is None:
            raise UnsupportedError("a forward with a PiKVPackedContext outside of its packed(): which requests its tokens are is not known")
        if key.shape[:2] != (self._positions.numel(), 1):
            raise UnsupportedError(f"{self._positions.numel()} tokens were announced, the forward has {tuple(key.shape[:2])}")
        parent, keep, new, prompt = self._given if self._given[0] else ([-1], [0], [0], [])
        self._refuse_after_failure(bool(self.lens))
        pieces = [Piece(row, kept, more) for row, (kept, more) in enumerate(zip(keep, new, strict=True)) if more]
        tokens: Tokens = Nothing(len(parent), key.shape[:2], self.core.device)
        if pieces:
            tokens = Packed(pieces, len(parent), key.shape[0], self.core.device)
        fresh = self.lens is None
        self.core.begin_step(
            LocalStep(
                num_rows=len(parent),
                num_columns=tokens.positions.shape[1],
                num_new=new,
                parent=parent,
                keep=keep,
                positions=tokens.positions,
                fresh=fresh,
                identity=not fresh and parent == list(range(len(self.lens))) and keep == self.lens,
                aligned=True,
                prompt=prompt,
                digest=positions_digest(self.core, True, key, tokens.positions) if fresh or self.core.replicated else 0,
            )
        )
        self._after = [kept + more for kept, more in zip(keep, new, strict=True)]
        return tokens

    def end_forward(self) -> None:
        self.lens = self._after

"""The inference context of static batching over an expert-sharded store. B rows, T columns of a forward, H heads, D head_dim."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor, nn

from pikv_ds.errors import UnsupportedError
from pikv_ds.modes import eager
from pikv_ds.step.step import LocalStep

from . import sessions
from .base_context import PiKVContext, check_length, positions_digest
from .masks import padding_of
from .tokens import Columns, Nothing, Tokens
from .version import check_feature


class PiKVInferenceContext(PiKVContext, StaticInferenceContext):
    """Takes the place of StaticInferenceContext: PiKVInferenceContext(max_batch_size, max_sequence_length, model=model).

    The caller advances it as usual (increment_sequence_len_offset, reset, swap_key_value_dict). A sequence_len_offset of 0 starts new
    requests; a smaller one than was reached takes the later tokens back. All ranks of the expert-parallel group run the same number
    of forwards: a rank without work runs them under idle().
    """

    @eager
    def __init__(
        self,
        max_batch_size: int,
        max_sequence_length: int,
        *options,
        model: nn.Module | None = None,
        config=None,
        group: dist.ProcessGroup | None = None,
        **named_options,
    ) -> None:
        """
        Args:
            max_batch_size, max_sequence_length: limits as in StaticInferenceContext; nothing is allocated for them.
            model: enabled by enable_pikv, or built from a pikv_layer_spec; None = bind(model) follows.
            config: the "pikv" block; None = the one the model was enabled with.
            group: None = the model's expert-parallel group.
            options, named_options: what else the host's StaticInferenceContext takes.

        Collectives: none.
        """
        check_feature("static batching")
        super().__init__(max_batch_size, max_sequence_length, *options, **named_options)
        self.key_value_memory_dict = _NoDenseCache()
        self._next_prompt = 0  # columns of a prompt that the next forward begins
        self._begin_generation()
        if model is not None:
            self.bind(model, config, group)
        elif config is not None or group is not None:
            raise UnsupportedError("config and group go with model: give all of them here, or all of them to bind()")

    @classmethod
    def from_config(cls, config, *, model: nn.Module | None = None, pikv=None, group: dist.ProcessGroup | None = None):
        """With the limits of an InferenceWrapperConfig, as StaticInferenceContext.from_config; pikv: the "pikv" block."""
        return cls(config.inference_max_requests, config.inference_max_seq_length, model=model, config=pikv, group=group)

    # ---- the caller's controls -----------------------------------------------------------------------------------------------

    def stats(self) -> dict:
        """Plain numbers of this rank, see pikv_ds.cache.stats.stats. Sync: reads the device. Needs no other rank."""
        return self._stats(len(self.rows), self.columns)

    def save(self, path: str | Path, note: dict[str, Any] | None = None) -> int:
        """Write the requests to a file, for load() here or by transformers' side of the same model. All ranks of the expert-parallel group
        at the same point, which run the same requests. Returns: bytes. Raises, on all ranks: UnsupportedError, SessionError."""
        return sessions.save(self, path, note)

    @eager
    def load(self, path: str | Path) -> dict[str, Any] | None:
        """The requests of a file take the place of what is held, and sequence_len_offset is behind their last token: the next forward
        continues them. All ranks at the same point. Returns: the note. Raises, with all as before: SessionError, UnsupportedError."""
        return sessions.load(self, path)

    def take_over(self, rows: int, columns: int) -> None:
        """The cache holds so many requests of as many tokens, as after a forward of them."""
        super().reset()
        self._begin_generation()
        self.columns, self.rows, self.sequence_len_offset = columns, list(range(rows)), columns

    @eager
    def reset(self) -> None:
        """The next forward starts new requests; the old ones' memory returns when it does. Local: ranks may reset at different times."""
        super().reset()
        self._begin_generation()

    def expect_prompt(self, columns: int) -> None:
        """The next `columns` columns are one prompt, however many forwards bring them: scheduling.prefill "auto" evicts nothing of it
        before its end."""
        self._next_prompt = columns

    def swap_key_value_dict(self, batch_idx) -> None:
        """Row i continues row batch_idx[i] from the next forward on (beam search)."""
        if not self.rows:
            raise ValueError("swap_key_value_dict: nothing is stored yet; run a forward first")
        index = [int(i) for i in batch_idx]
        self.rows = [self.rows[i] for i in index]
        self._rows_moved = True

    # ---- one forward ---------------------------------------------------------------------------------------------------------

    def rotary_rows(self, columns: int) -> slice | None:
        if self._idle:
            return None
        start = self.sequence_len_offset
        check_length(start + columns, self.max_sequence_length)  # a slice beyond the table would be silently short
        return slice(start, start + columns)

    def begin_forward(self, key: Tensor, attention_mask: Tensor | None, idle: bool) -> Tokens:
        columns, rows = key.shape[:2]
        start = self.sequence_len_offset
        self._refuse_after_failure(start > 0)
        if not idle:
            self._check(rows, columns, start)
            if start == 0:
                self._begin_generation()
        fresh = not self.rows
        padding = None if self.padding is None else self.padding[self.rows]
        if idle:
            rows, start, end = len(self.rows) or 1, self.columns, self.columns
            tokens: Tokens = Nothing(rows, key.shape[:2], self.core.device)
        else:
            end = start + columns
            padding = self._padding(attention_mask, rows, columns, None if padding is None else padding[:, :start])
            tokens = Columns(*_positions(padding, rows, start, end, self.core.device))
        keep, after = _real_tokens(padding, rows, start), _real_tokens(padding, rows, end)
        prompt: list[int] = []
        if self._next_prompt and not idle:
            self.prompt_columns, self._next_prompt = start + self._next_prompt, 0
        if not idle and start < self.prompt_columns:
            rest = max(0, self.prompt_columns - end)  # columns, so at least as many tokens as come
            prompt = [total + rest for total in after]
        value = 0
        if fresh or self.core.replicated:
            value = positions_digest(self.core, self.shared is not None or self.later_stage or idle, key, tokens.positions)
        self.core.begin_step(
            LocalStep(
                num_rows=rows,
                num_columns=tokens.positions.shape[1],
                num_new=[total - kept for total, kept in zip(after, keep, strict=True)],
                parent=[-1] * rows if fresh else list(self.rows),
                keep=keep,
                positions=tokens.positions,
                digest=value,
                identity=not fresh and not self._rows_moved and start == self.columns,
                fresh=fresh,
                prompt=prompt,
            )
        )
        self._after = (rows, end, padding)
        return tokens

    def end_forward(self) -> None:
        rows, self.columns, self.padding = self._after
        self.rows, self._rows_moved = list(range(rows)), False

    def _begin_generation(self) -> None:
        self.columns = 0  # per row, padding included
        self.prompt_columns = 0  # where the prompt that is being fed ends; 0 = not known
        self.padding: Tensor | None = None  # [rows of the last forward, columns] bool; None = no column is padding
        self.rows: list[int] = []  # per row, the row of the last forward that it continues
        self._rows_moved = False

    def _padding(self, mask: Tensor | None, rows: int, columns: int, held: Tensor | None) -> Tensor | None:
        found = padding_of(mask, rows, columns, held, self.sequence_len_offset)
        if found is not None and any(spec.window for spec in self.core.layers):
            raise UnsupportedError(
                "attention_mask hides padding in a model with a sliding window: Megatron's local attention drops the mask of such layers; "
                "prefill up to the shortest prompt and feed the rest token by token, as StaticInferenceEngine does"
            )
        return found

    def _check(self, rows: int, columns: int, offset: int) -> None:
        check_length(offset + columns, self.max_sequence_length)
        if rows > self.max_batch_size:
            raise ValueError(
                f"a forward of {rows} rows exceeds max_batch_size = {self.max_batch_size}; build the context with a larger limit"
            )
        if self.batch_size_offset:
            raise UnsupportedError(
                f"batch_size_offset = {self.batch_size_offset}: a batch in parts (pipeline micro-batches) is not supported; set "
                f"inference_batch_times_seqlen_threshold = -1"
            )
        if offset > self.columns:
            raise UnsupportedError(f"sequence_len_offset = {offset}, but {self.columns} columns have been run: tokens in between were not")
        if offset and rows != len(self.rows):
            raise UnsupportedError(
                f"the forward has {rows} rows, {len(self.rows)} are stored; call swap_key_value_dict to choose rows, or reset()"
            )


def _positions(padding: Tensor | None, rows: int, start: int, end: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Of columns start to end: positions [rows, end - start] int32 among the row's real tokens, -1 = padding; and the padding."""
    if padding is None:
        return torch.arange(start, end, dtype=torch.int32).repeat(rows, 1).to(device), None
    positions = ((~padding).cumsum(1, dtype=torch.int32) - 1).masked_fill(padding, -1)
    return positions[:, start:].to(device), padding[:, start:].to(device)


def _real_tokens(padding: Tensor | None, rows: int, end: int) -> list[int]:
    """Per row, how many of the first `end` columns are not padding."""
    return [end] * rows if padding is None else (~padding[:, :end]).sum(1).tolist()


def all_logits(context: StaticInferenceContext) -> None:
    """From now on a forward with this context, PiKV's or the host's, gives the logits of all its columns, not of the last one alone."""
    getattr(context, "config", context).materialize_only_last_token_logits = False  # from 0.17 on a context keeps it in its config


class _NoDenseCache(dict):
    """Stands where Megatron keeps its dense buffers: whoever allocates one has not been replaced, and stops here."""

    def __setitem__(self, key, value) -> None:
        raise UnsupportedError(
            f"layer {key} allocates a dense cache in a PiKVInferenceContext: that layer is not enabled for PiKV; call enable_pikv(model) "
            f"on the model this context is used with"
        )

"""Requests of different lengths in one forward of [1, N] tokens, one request after the other: continuous batching without padding.

Layers, routers and experts see the N tokens alone. Attention works on a rectangle of R rows and T columns, as long as the longest piece;
what is padding in it is neither stored nor asked for. H heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from pikv_ds.cache.cache import PiKVCache
from pikv_ds.cache.chunk import finish
from pikv_ds.cache.gradient import is_recorded
from pikv_ds.errors import UnsupportedError
from pikv_ds.exchange.digest import digest_there
from pikv_ds.placement.placement import Routed
from pikv_ds.staging import sent
from pikv_ds.step.query import Partial
from pikv_ds.step.step import LocalStep

from .conversation import Conversation
from .gradient import Chunk, Inputs, stored


class Rows(NamedTuple):
    """What a packed forward brings, one item per row."""

    parent: list[int]
    """The row of the last forward that it continues; -1: a new request."""
    keep: list[int]
    """How many tokens it keeps of that row."""
    new: list[int]
    """Tokens in this forward; 0: the row only stays."""
    prompt: Sequence[int] = ()
    """Tokens of its prompt, 0 = not known: scheduling.prefill "auto" evicts nothing of it before they are there. Empty: of no row."""


class Packed:
    """How the tokens of one forward lie. A rank without rows, or whose rows bring nothing, runs one token that is stored nowhere."""

    def __init__(self, rows: Rows, device: torch.device) -> None:
        self.given, self.device = rows, device
        self.rows = rows if rows.parent else Rows([-1], [0], [0])
        self.num_rows, self.num_columns = len(self.rows.parent), max(1, *self.rows.new)
        self.num_tokens = sum(self.rows.new)
        self.num_host_tokens = max(1, self.num_tokens)
        self.whole = self.num_tokens == self.num_rows * self.num_columns
        """The rectangle has no padding: nothing needs to be moved."""

    @cached_property
    def index(self) -> Tensor:
        """[N] int64, where each token lies in the rectangle."""
        columns, new = self.num_columns, torch.tensor(self.rows.new)
        row = torch.arange(self.num_rows).repeat_interleave(new)
        within = torch.arange(self.num_tokens) - (new.cumsum(0) - new).repeat_interleave(new)
        return sent(row * columns + within, torch.int64, self.device)

    @cached_property
    def positions(self) -> Tensor:
        """[R, T] int32 on the host, -1 = padding."""
        column = torch.arange(self.num_columns, dtype=torch.int32)
        keep, new = (torch.tensor(x, dtype=torch.int32).unsqueeze(1) for x in (self.rows.keep, self.rows.new))
        return torch.where(column < new, keep + column, -1)

    @property
    def position_ids(self) -> Tensor:
        """[1, N] int64, what the model is given."""
        positions = self.positions.flatten()
        return positions[positions >= 0].to(self.device, torch.int64)[None] if self.num_tokens else torch.zeros_like(self.index_of_nothing)

    @property
    def index_of_nothing(self) -> Tensor:
        """[1, 1] zero, the token of a forward that has none."""
        return torch.zeros(1, 1, dtype=torch.int64, device=self.device)

    @cached_property
    def groups(self) -> list[tuple[Tensor | None, int]]:
        """(rows, columns) of smaller rectangles that together hold all tokens: rows of one token, and longer ones. None: all rows."""
        if self.whole:
            return [(None, self.num_columns)]
        found = ([i for i, n in enumerate(self.rows.new) if n == 1], [i for i, n in enumerate(self.rows.new) if n > 1])
        return [(sent(rows, torch.int64, self.device), max(self.rows.new[i] for i in rows)) for rows in found if rows]

    def rectangle(self, x: Tensor) -> Tensor:
        """[N, ...] of the host's tokens -> [R, T, ...], zeros where there is none."""
        if self.whole:
            return x.unflatten(0, (self.num_rows, self.num_columns))
        out = x.new_zeros(self.num_rows * self.num_columns, *x.shape[1:])
        return out.index_copy_(0, self.index, x[: self.num_tokens]).unflatten(0, (self.num_rows, self.num_columns))

    def flat(self, x: Tensor) -> Tensor:
        """The way back: [R, T, ...] -> [N, ...]."""
        if self.whole:
            return x.flatten(0, 1)
        out = x.new_zeros(self.num_host_tokens, *x.shape[2:])
        out[: self.num_tokens] = x.flatten(0, 1).index_select(0, self.index)
        return out

    def experts(self, ids: Routed | Tensor | None) -> Routed | Tensor | None:
        """Of the host's tokens [N] -> of the rectangle's [R * T]."""
        if isinstance(ids, Routed):
            return Routed(*(self.rectangle(x).flatten(0, 1) for x in ids))
        return None if ids is None else self.rectangle(ids).flatten(0, 1)

    # ---- a forward -----------------------------------------------------------------------------------------------------------

    def plan(self, conversation: Conversation, tokens: Tensor, given: dict) -> LocalStep:
        """What this rank brings. Changes nothing. Raises: UnsupportedError."""
        self._check(conversation, tokens, given)
        rows, core, value = self.rows, conversation.core, 0
        if core.ranks.size > 1 and (conversation.fresh or core.replicated):
            value = digest_there([tokens], [self.positions, torch.tensor(rows.keep), torch.tensor(rows.parent)])
        continued = rows.parent == list(range(len(conversation.lens))) and rows.keep == conversation.lens
        return LocalStep(
            num_rows=self.num_rows,
            num_columns=self.num_columns,
            num_new=rows.new,
            parent=rows.parent,
            keep=rows.keep,
            positions=sent(self.positions, torch.int32, core.device),
            digest=value,
            identity=continued and not conversation.fresh and not conversation.touched,
            fresh=conversation.fresh,
            aligned=True,
            prompt=rows.prompt,
        )

    def _check(self, conversation: Conversation, tokens: Tensor, given: dict) -> None:
        rows, lens = self.rows, conversation.lens
        if conversation.states.layers:
            raise UnsupportedError(
                f"{conversation.model} has layers that keep the state of a convolution or a recurrence: their tokens must come row by row, "
                "so requests can't be packed into one row; run them with generate(), padded"
            )
        if given.get("attention_mask") is not None or given.get("position_ids") is None:
            raise UnsupportedError("a packed forward takes position_ids and no attention_mask: Packed.position_ids")
        if tokens.shape[:2] != (1, self.num_host_tokens):
            raise UnsupportedError(f"a packed forward of {self.num_tokens} tokens was given tokens {tuple(tokens.shape[:2])}")
        if conversation.touched:
            raise UnsupportedError("rows were selected or cropped before a packed forward; say so in its Rows instead")
        for row, (parent, keep) in enumerate(zip(rows.parent, rows.keep, strict=True)):
            held = 0 if parent < 0 else lens[parent] if parent < len(lens) else -1
            if keep > held:
                raise UnsupportedError(f"row {row} keeps {keep} tokens of row {parent}, which has {max(held, 0)} (rows held: {len(lens)})")

    def finish(self, conversation: Conversation) -> None:
        """Account for a forward that has run. Its rows lie left-aligned for what comes next without packing."""
        rows = self.rows
        conversation.lens = [keep + new for keep, new in zip(rows.keep, rows.new, strict=True)]
        conversation.parent, conversation.fresh, conversation.touched = list(range(self.num_rows)), False, False
        lens = torch.tensor(conversation.lens)
        conversation.columns = int(lens.max())
        whole = bool((lens == conversation.columns).all())
        conversation.column_mask = None if whole else torch.arange(conversation.columns) < lens.unsqueeze(1)

    def attention(self, core: PiKVCache, layer: int, inputs: Inputs, chunk: Chunk, expert_ids: Routed | Tensor | None) -> Tensor:
        """As gradient.attention, of inputs with B = 1 and T = N: [1, N, Hq, Dv] f32, without a graph."""
        if is_recorded(*inputs):
            raise UnsupportedError("a packed forward records a graph; run it under torch.no_grad()")
        if chunk.mask is not None:
            raise UnsupportedError(f"layer {layer} masks the tokens of a packed forward in a way of its own; run the requests padded")
        by_head = [self.rectangle(x[0].transpose(0, 1)).transpose(1, 2) for x in (inputs.query, inputs.key, inputs.value)]
        entries = [self.rectangle(x[0]) for x in (inputs.entry_k, inputs.entry_v)]
        inputs = Inputs(*by_head, *entries, *inputs[5:])
        found, _ = stored(core, layer, inputs, chunk.scale, self.experts(expert_ids), None)
        if found.includes_self or self.whole:
            return self.flat(self._finished(found, inputs, chunk)).unsqueeze(0)
        out = found.out.new_zeros(found.out.shape)
        for rows, columns in self.groups:
            out[rows, :columns] = self._finished(*self._part(found, inputs, chunk, rows, columns))
        return self.flat(out).unsqueeze(0)

    @staticmethod
    def _part(found: Partial, inputs: Inputs, chunk: Chunk, rows: Tensor, columns: int) -> tuple[Partial, Inputs, Chunk]:
        """Of some rows, their first columns."""
        by_head = [x.index_select(0, rows)[:, :, :columns] for x in inputs[:3]]
        found = found._replace(out=found.out.index_select(0, rows)[:, :columns], lse=found.lse.index_select(0, rows)[:, :columns])
        hidden, positions = (None if x is None else x.index_select(0, rows)[:, :columns] for x in (chunk.hidden, chunk.positions))
        return found, Inputs(*by_head, *inputs[3:]), chunk._replace(hidden=hidden if columns > 1 else None, positions=positions)

    @staticmethod
    def _finished(found: Partial, inputs: Inputs, chunk: Chunk) -> Tensor:
        return finish(found, inputs.query, inputs.key, inputs.value, **chunk._asdict(), sink=inputs.sink)

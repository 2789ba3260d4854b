"""One forward: whose tokens are in it, how long every request is before and after, what waits in it. Host side, once per forward."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from pikv_ds.modes import eager
from pikv_ds.placement.placement import hash_expert
from pikv_ds.staging import sent

from .query import LateEntries, LateLse

Made = TypeVar("Made")


@dataclass(slots=True, kw_only=True)
class LocalStep:
    """What this rank brings to a forward. B request rows, T token columns.

    num_new: real (not padding) tokens per row; parent and keep: which earlier row each row continues and up to which position
    (parent -1 = a new request; from the number of this rank's rows on: parked ones). positions: [B, T] int32 on the device, -1 = padding.
    digest: what replicated ranks compare, a number or 0-d int64 on the device. prompt: per row the tokens of its prompt, 0 = not known;
    empty: of no row, or all of them have come before.
    """

    num_rows: int
    num_columns: int
    num_new: list[int]
    parent: list[int]
    keep: list[int]
    positions: Tensor
    digest: int | Tensor
    identity: bool  # rows continue themselves, nothing cropped
    fresh: bool  # all rows are new requests
    aligned: bool = False  # the tokens of a row are its first columns
    prompt: Sequence[int] = ()
    park: list[tuple[int, int]] | None = None
    """Which rows are parked from this forward on (pages/parked.py): (row, numbered as parent is; tokens that stay of it). None: those that
    are."""

    @property
    def idle(self) -> bool:
        """No token of this forward is stored: a finished rank, or one without requests, that only keeps step."""
        return not any(self.num_new)

    @property
    def plain_decode(self) -> bool:
        """One stored token per row, or none at all, and the rows unchanged: nothing that other ranks need to be told."""
        return self.num_columns == 1 and self.identity and not self.prompt and (self.idle or all(self.num_new)) and self.park is None


@dataclass(frozen=True, slots=True)
class Source:
    """The tokens one rank brings: B rows of T columns; its rows are row0 .. row0 + B - 1 of the tables."""

    num_rows: int
    num_columns: int
    row0: int

    @property
    def num_tokens(self) -> int:
        return self.num_rows * self.num_columns


class Step:
    """What all ranks agreed on for one forward, and what waits in it for a later layer. R rows in all, N tokens per source after padding.

    Device tensors, made when first asked for: rows [sources * N] int64 ascending; lens_before, lens_after [R] int64; one_column [R]
    bool, rows whose source has T == 1. positions [sources * N] int32 (-1 = padding) and valid come with the first record of the forward.
    """

    def __init__(
        self,
        shapes: list[tuple[int, int]],
        own: int,
        before: list[int],
        after: list[int],
        device: torch.device,
        *,
        hold: bool = False,
        margin: int | None = 0,
        late_experts: bool = False,
        rehearsal: bool = False,
        unsettled: Sequence[bool] = (),
        aligned: bool = False,
        prompt: Sequence[int] = (),
    ) -> None:
        """shapes: (B, T) per source; own: index of this rank's source; before, after: tokens of every row, in source order.

        hold: some rank may take back tokens of it (a crop is announced); margin: so many at most, None = another rank knows how many.
        late_experts: entries wait for their layer's router, and are stored after the queries of their layer (storage.expert_ids "true").
        rehearsal: what this forward counts stays, though its tokens go. unsettled: per rank, whether it may take back tokens of an earlier
            forward, too; shorter than the sources: those of the others may not.
        aligned: of all sources, the tokens of a row are its first columns. prompt: per row, tokens of its prompt, as in LocalStep.
        """
        self.sources: list[Source] = []
        row0 = 0
        for num_rows, num_columns in shapes:
            self.sources.append(Source(num_rows, num_columns, row0))
            row0 += num_rows
        self.unsettled: list[bool] = []
        """Per row; empty: none is."""
        if any(unsettled):
            self.unsettled = [yes for source, yes in zip(self.sources, unsettled, strict=False) for _ in range(source.num_rows)]
        self.own, self.device, self.aligned, self.prompt = own, device, aligned, prompt
        self.hold, self.margin, self.late_experts = hold, margin, late_experts
        self.tentative = hold and not rehearsal
        """What is counted of this forward's last tokens waits until it is known which of them stay (pages/undoing.py)."""
        self.lens_before_host, self.lens_after_host = before, after
        self.num_new = [a - b for a, b in zip(after, before, strict=True)]
        self.num_tokens = max(s.num_tokens for s in self.sources)
        self.decode = all(s.num_columns == 1 for s in self.sources)  # no row has two tokens
        self.all_see_own = self.decode and not late_experts
        """Every query sees the entries of its own forward, so that nobody must be shown the pages as they were before."""
        self.all_valid = len(self.sources) == 1 and sum(self.num_new) == self.num_tokens  # no padding, no idle rank
        self.positions: Tensor | None = None
        self.valid: Tensor | None = None
        self.late: LateEntries | None = None
        """Entries of the layer before, whose expert that layer's router has named by now, or will."""
        self.late_lse: LateLse | None = None
        """Queries of a layer whose merged lse rides in the next record: distinct requests and a policy that watches."""
        self._hashed: Tensor | None = None
        self.capacity: list[int] = []  # per layer: entries a shard may hold
        self.may_spill: list[bool] = []  # per layer
        self.may_open: list[bool] = []  # per layer: a new page may be needed
        self.quiet = False  # no page is opened, so no sizes change but the counts
        self.held = False  # every page that it may open is held for it (Room.hold)
        self.capacity_there: Tensor | None = None
        """[L] int64, the same as `capacity` where a step that is played again reads it; None: it is not."""
        self._shared: dict[Hashable, Any] = {}

    def lies_at(self, lens_before: Tensor, lens_after: Tensor, capacity: Tensor) -> None:
        """The step is recorded or played again: sizes are read where they lie, [R], [R] and [L] int64, and any row may have no token."""
        self.__dict__ |= {"lens_before": lens_before, "lens_after": lens_after}
        self.capacity_there, self.all_valid = capacity, False

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What is the same in every layer of a forward, made by the first that asks."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def within_prompt(self, lens: list[int]) -> list[bool]:
        """Per row of `lens` tokens, whether more of its prompt is known to come; empty: of no row."""
        return [n < end for n, end in zip(lens, self.prompt, strict=True)] if self.prompt else []

    def sees_own(self, source: Source) -> bool:
        """Whether queries of a source find their own entries stored: one column, stored before it is read."""
        return source.num_columns == 1 and not self.late_experts

    def reads(self, source: Source) -> bool:
        """Whether a source's queries have anything to look up: stored tokens, or their own entry."""
        return self.sees_own(source) or any(self.lens_before_host[source.row0 : source.row0 + source.num_rows])

    @property
    def lens_seen(self) -> list[int]:
        """[R] stored tokens that the queries of each row see: with their own entry one more."""
        seen = list(self.lens_before_host)
        for source in self.sources:
            if self.sees_own(source):
                rows = slice(source.row0, source.row0 + source.num_rows)
                seen[rows] = self.lens_after_host[rows]
        return seen

    @cached_property
    def rows(self) -> Tensor:
        if len(self.sources) == 1:
            token, columns = torch.arange(self.num_tokens, device=self.device), self.sources[0].num_columns
            return token if columns == 1 else token // columns
        make = _rows_of if self.decode else _rows_of.__wrapped__
        return make(tuple((s.num_rows, s.num_columns, s.row0) for s in self.sources), self.num_tokens, self.device)

    @cached_property
    def lens_before(self) -> Tensor:
        return sent(self.lens_before_host, torch.int64, self.device)

    @cached_property
    def lens_after(self) -> Tensor:
        return sent(self.lens_after_host, torch.int64, self.device)

    @cached_property
    def one_column(self) -> Tensor:
        if self.decode:
            return torch.ones(len(self.num_new), dtype=torch.bool, device=self.device)
        return sent([s.num_columns == 1 for s in self.sources for _ in range(s.num_rows)], torch.bool, self.device)

    @cached_property
    def rows_see_own(self) -> Tensor:
        """[R] bool: sees_own, by row."""
        return self.one_column & (not self.late_experts)

    def set_positions(self, positions: Tensor) -> None:
        self.positions = positions.contiguous()
        self.valid = positions >= 0
        self._hashed = None

    def set_plain(self, positions: Tensor, rows: Tensor, valid: Tensor) -> None:
        """As set_positions, of a step with one token of every row: `rows` and `valid` are kept from one step to the next."""
        self.positions, self.valid, self._hashed = positions, valid, None
        self.__dict__["rows"] = rows

    def hashed_experts(self, num_experts: int) -> Tensor:
        """[sources * N] int64: position mod num_experts, for entries that no router has seen."""
        if self._hashed is None:
            assert self.positions is not None, "set_positions comes first"
            self._hashed = hash_expert(self.positions, num_experts)
        return self._hashed

    def query_positions(self, row0: int, num_rows: int) -> Tensor:
        """[num_rows, T] positions of the queries of neighbouring sources with equal shapes, the first of which starts at row0."""
        return self.once(("positions", row0, num_rows), lambda: self._query_positions(row0, num_rows))

    def _query_positions(self, row0: int, num_rows: int) -> Tensor:
        first = next(i for i, source in enumerate(self.sources) if source.row0 == row0)
        source = self.sources[first]
        assert self.positions is not None, "set_positions comes first"
        run = self.positions.view(len(self.sources), -1)[first : first + num_rows // source.num_rows, : source.num_tokens]
        return run.reshape(num_rows, source.num_columns)

    def parts(self, row0: int, num_rows: int) -> list[tuple[Tensor, int]] | None:
        """(rows [n] int64 counted from row0, columns) that hold all tokens of neighbouring sources: rows of one token, and longer ones.

        None: most of their columns hold tokens, or it is not known which do.
        """
        if not self.aligned:
            return None
        return self.once(("parts", row0, num_rows), lambda: self._parts(row0, num_rows))

    def _parts(self, row0: int, num_rows: int) -> list[tuple[Tensor, int]] | None:
        new = self.num_new[row0 : row0 + num_rows]
        columns = next(source.num_columns for source in self.sources if source.row0 == row0 and source.num_rows)
        if 2 * sum(new) >= num_rows * columns:
            return None
        found = ([i for i, n in enumerate(new) if n == 1], [i for i, n in enumerate(new) if n > 1])
        return [(sent(rows, torch.int64, self.device), max(new[i] for i in rows)) for rows in found if rows]

    def same_shape_runs(self) -> list[list[Source]]:
        """Neighbouring sources with equal B and T: their queries are one batch."""
        runs: list[list[Source]] = []
        for source in self.sources:
            if runs and (runs[-1][0].num_rows, runs[-1][0].num_columns) == (source.num_rows, source.num_columns):
                runs[-1].append(source)
            else:
                runs.append([source])
        return runs


@lru_cache(maxsize=8)
@eager
def _rows_of(sources: tuple[tuple[int, int, int], ...], num_tokens: int, device: torch.device) -> Tensor:
    """[sources * N] int64 of sources (B, T, row0): the same in every decode step. Sync: none."""
    token = torch.arange(num_tokens, device=device)
    return torch.cat([row0 + (token // columns).clamp_max(rows - 1) for rows, columns, row0 in sources])

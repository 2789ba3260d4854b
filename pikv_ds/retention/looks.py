"""What policies are shown of a forward: which rows, where their counters lie, what each query gave to which page.

R request rows, T queries per row, b of them at a time, Hq query heads, X counters of a pool, H head tables.
"""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from torch import Tensor

from pikv_ds.pages.pool import PagePool
from pikv_ds.policies.base import RetentionPolicy, Seen
from pikv_ds.step.step import Step


class Run(NamedTuple):
    """Rows of neighbouring sources with as many columns."""

    row0: int
    num_rows: int
    num_columns: int
    sources: slice

    def of(self, x: Tensor | None) -> Tensor | None:
        """[G, N, ...] -> [R, T, ...] of these rows."""
        if x is None:
            return None
        tokens = self.num_rows * self.num_columns // (self.sources.stop - self.sources.start)
        return x[self.sources, :tokens].reshape(self.num_rows, self.num_columns, *x.shape[2:])


class Facts:
    """What a Seen says about rows, the same for all its blocks of queries. With a page per head, the heads of a row count as rows."""

    def __init__(self, pool: PagePool, step: Step, evicted: Tensor) -> None:
        """evicted: [R, H] int64."""
        seats, self.nowhere = pool.seats()
        self.pool, self.heads, self.num_rows, self.page_size = pool, pool.table.heads, step.lens_after.shape[0], pool.page_size
        num_rows, heads = self.num_rows * self.heads, self.heads
        rows = torch.arange(num_rows, device=seats.device).view(-1, 1, heads, 1).expand_as(pool.table.by_shard(seats)).reshape(-1)
        self.seats = seats.view(-1)  # [R * S * H * C], where there is no page: nowhere
        nobody = torch.full((self.nowhere + 1,), num_rows, device=seats.device)
        self.row = nobody.scatter_(0, self.seats, rows)[:-1]  # a counter is one row's
        self.entries = (step.lens_after.unsqueeze(1) - evicted).flatten()
        self.lens = step.lens_after
        self.clock = self.of_rows(self.lens)  # [X], after this forward

    def of_rows(self, x: Tensor) -> Tensor:
        """x [R] -> [X], of the row of each counter, 0 where it is nobody's."""
        return torch.nn.functional.pad(x.repeat_interleave(self.heads), (0, 1))[self.row]

    def dropped(self, kept: Tensor) -> Tensor:
        """[R] int64, tokens of this forward that were taken back."""
        return (self.lens - kept).clamp_min(0)

    def seats_of(self, run: Run) -> Tensor:
        """[R * S * H * C] of the rows of a run."""
        return self.seats.view(self.num_rows, -1)[run.row0 : run.row0 + run.num_rows].flatten()

    def seat_of_new(self, slots: Tensor) -> Tensor:
        """slots, -1 = not here, of entries of this forward: they lie in pages that one row alone has."""
        page = torch.where(slots >= 0, slots // self.page_size, -1)
        if self.pool.counts_by_page:
            return torch.where(page >= 0, page, self.nowhere)
        ids = self.pool.table.ids.view(-1)
        nowhere = torch.full((self.pool.num_pages + 1,), self.nowhere, device=slots.device)
        of_page = nowhere.scatter_(0, torch.where(ids >= 0, ids, self.pool.num_pages).to(torch.int64), self.seats)
        return of_page[page]  # -1: where no page is

    def seen(self, share: Tensor, run: Run, looks: Looks, kept: Tensor | None) -> Seen:
        """share [X, b]: that of `looks` in this pool. kept [R]: tokens that rows go on with; None: with all."""
        real = looks.real
        if run.num_rows < self.num_rows:
            real = torch.nn.functional.pad(real, (0, 0, run.row0, self.num_rows - run.row0 - run.num_rows))
        clock, entries = self.clock, self.entries
        if kept is not None:
            clock = clock - self.of_rows(self.dropped(kept))
            entries = entries - self.dropped(kept).repeat_interleave(self.heads)
        real = real.repeat_interleave(self.heads, 0)
        return Seen(
            share=share, row=self.row, real=real, entries=entries, page_size=self.page_size, time=clock - looks.to_come - share.shape[1]
        )


class Looks(NamedTuple):
    """Queries in neighbouring columns, padding first: what one run of rows looked at in a layer."""

    shares: tuple[Tensor, ...]
    """By pool [X, b]."""
    positions: Tensor
    """[R, b], -1 = padding."""
    queries: tuple[Tensor, ...]
    """q [R, b, Hq, Dk] f32, scaled, and lse [R, b, Hq]; empty where nobody asks for them."""
    to_come: int
    """Columns of the forward after these."""

    @property
    def real(self) -> Tensor:
        return self.positions >= 0

    @classmethod
    def joined(cls, parts: list[Self]) -> Self:
        """Neighbouring columns as one."""
        shares = tuple(torch.cat(own, 1) for own in zip(*(part.shares for part in parts), strict=True))
        queries = tuple(torch.cat(own, 1) for own in zip(*(part.queries for part in parts), strict=True))
        return cls(shares, torch.cat([part.positions for part in parts], 1), queries, parts[-1].to_come)

    def without(self, facts: list[Facts], run: Run, kept: Tensor, window: int | None) -> Self:
        """The queries that stay when rows go on with `kept` [R] tokens: the last one of every row is in the last column again."""
        dropped = facts[0].dropped(kept)
        of_run = dropped[run.row0 : run.row0 + run.num_rows]
        shares = tuple(_moved(x, fact.of_rows(dropped), 0.0) for x, fact in zip(self.shares, facts, strict=True))
        moved = Looks(shares, _moved(self.positions, of_run, -1), tuple(_moved(x, of_run, 0.0) for x in self.queries), self.to_come)
        return moved.last(window)

    def last(self, columns: int | None) -> Self:
        """So many last columns; None: all."""
        if columns is None:
            return self
        shares, queries = (tuple(x[:, -columns:] for x in each) for each in (self.shares, self.queries))
        return Looks(shares, self.positions[:, -columns:], queries, self.to_come)


class Waiting(NamedTuple):
    """What a policy has not been shown yet, as a crop may take it back."""

    policy: RetentionPolicy
    layer: int
    facts: list[Facts]
    run: Run
    looks: Looks

    @property
    def tensors(self) -> list[Tensor]:
        facts = (x for fact in self.facts for x in (fact.seats, fact.row, fact.entries, fact.lens, fact.clock))
        return [*self.looks.shares, self.looks.positions, *self.looks.queries, *facts]


def _moved(x: Tensor, by: Tensor, fill: float) -> Tensor:
    """x [N, b, ...] with row i moved right by by[i] columns; `fill` comes in from the left."""
    at = torch.arange(x.shape[1], device=x.device) - by.unsqueeze(1)
    shape = (*at.shape, *[1] * (x.dim() - 2))
    return torch.where(at.view(shape) >= 0, x.gather(1, at.clamp_min(0).view(shape).expand_as(x)), fill)

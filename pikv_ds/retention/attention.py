"""Where attention goes: the share of every query's attention that each page got, from the lse of pages and the merged lse.

R request rows, S local shards, T queries per row, Hq query heads, X counters of a pool (pages/pool.py: one a page, or one a place in the
tables once rows share pages), C columns of a block table, H head tables: the kv heads when a page holds the entries of one head, else 1.
Nothing here reads the device back. Window layers are not watched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pikv_ds.pages.events import PageChange
from pikv_ds.pages.layers import RankPages
from pikv_ds.pages.pool import PagePool
from pikv_ds.pages.rows import RowColumn
from pikv_ds.policies.base import RetentionPolicy, Seen
from pikv_ds.step.query import LateLse
from pikv_ds.step.step import Step

from .share_sums import share_inside, share_of_pages, take

BLOCK_ELEMENTS = 1 << 22  # of the scores inside a chunk that are held at a time


class Shares:
    """Shows policies what the queries of each layer attend to. Keeps nothing of a layer but what its policies keep per row.

    A row's clock is the number of its tokens, so that it is the same beside other rows, after padding, a fork or a crop.
    """

    def __init__(self, policies: Sequence[RetentionPolicy], pages: RankPages, *, nearest_only: bool = False) -> None:
        """policies: the first may keep values per row, the others keep values per page only. nearest_only: what lies behind never comes
        back, so nobody counts its attention."""
        self.policies, self.pages, self.nearest_only = tuple(policies), pages, nearest_only
        self.columns: dict[int, dict[str, RowColumn]] = {}  # layer -> what the policy keeps per row
        if self.policies[0].row_queries:
            for layer in pages.layers:
                layer.events.rebuilt += (self.rebuilt,)

    def watches(self, layer: int) -> bool:
        """Whether somebody wants to see what the queries of this layer attend to."""
        pages = self.pages.layers[layer]
        return self.policies[0].watches and pages.spec.window is None and (not self.nearest_only or len(pages.pools) > 1)

    def looks_at(self, pool: PagePool) -> bool:
        """Whether the lse of this pool's pages is asked for, in a layer that is watched."""
        return not (self.nearest_only and pool.level)

    def rebuilt(self, change: PageChange) -> None:
        """Queries that the policy keeps go into the basis that the keys of their rows have now."""
        if change.basis is None or change.level:  # queries of pools behind are the layer's own
            return
        rows, by = change.basis
        kept, names = self.columns.get(change.layer, {}), self.policies[0].row_queries
        for x in (kept[name].value for name in names if name in kept):
            by_head = x[rows].unflatten(1, (by.shape[1], -1))
            x[rows] = torch.einsum("nhgr,nhrs->nhgs", by_head, by).flatten(1, 2)

    def rows_by_head(self, layer: int, num_tables: int) -> dict[str, Tensor]:
        """The layer's row values; with H head tables as [R * H, ...], the query heads of each among them."""
        rows = {name: column.value for name, column in self.columns.get(layer, {}).items() if column.used}
        if num_tables == 1:
            return rows
        return {
            name: x.unflatten(1, (num_tables, -1)).flatten(0, 1) if x.dim() > 1 else x.repeat_interleave(num_tables)
            for name, x in rows.items()
        }

    def observe(self, asked: LateLse, step: Step, lse: Tensor | None) -> None:
        """Account for the queries of one layer, once their partials have been merged over the ranks.

        Args: lse [G, N, Hq] over all stored entries that were read, None if there were none. In a forward of one column they include the
            query's own entry.
        """
        pools, num_sources, heads = self.pages.layers[asked.layer].pools, len(step.sources), self.pages.heads
        evicted = self.pages.directory.evicted[asked.layer].unflatten(-1, (-1, heads)).sum(1)
        facts = [_Facts(pool, step, evicted) for pool in pools]
        positions, slots = step.positions.view(num_sources, -1), asked.slots.view(num_sources, -1, heads)
        for sources in step.same_shape_runs():
            num_rows, at = sum(source.num_rows for source in sources), step.sources.index(sources[0])
            run = _Run(sources[0].row0, num_rows, sources[0].num_columns, slice(at, at + len(sources)))
            page_lse = asked.page_lse.get(run.row0) or [None] * len(pools)
            for policy in self.policies if num_rows else ():
                self._observe(policy, asked, step, facts, run, run.of(positions), run.of(slots), page_lse, run.of(lse))

    def _observe(
        self, policy: RetentionPolicy, asked: LateLse, step: Step, facts: list[_Facts], run: _Run, positions: Tensor, slots: Tensor,
        page_lse: list[Tensor | None], lse: Tensor | None,
    ) -> None:  # fmt: skip
        """The queries of one run; facts and page_lse by pool."""
        pools, includes_self = self.pages.layers[asked.layer].pools, run.num_columns == 1
        q, k, valid = run.of(asked.q), run.of(asked.k), positions >= 0
        columns = torch.arange(run.num_columns, device=valid.device).expand_as(valid)
        if not step.all_valid and run.num_columns > 1:
            columns = valid.to(torch.int8).argsort(dim=-1, stable=True)  # padding first, then the queries of a row in their order
        columns = columns[:, -(policy.window or run.num_columns) :]
        at_once = 1 if includes_self else max(1, BLOCK_ELEMENTS // (valid.numel() * q.shape[2]))
        k = k if includes_self else pools[0].reader.met(k, positions)
        seats = [fact.seats_of(run) for fact in facts]
        rows = self._rows(asked.layer, q) if policy.observes_queries else {}
        rows = {name: x[run.row0 : run.row0 + run.num_rows] for name, x in rows.items()}
        for begin in range(0, columns.shape[1], at_once):
            block = columns[:, begin : begin + at_once]
            own, total, real = None, take(lse, block), valid.gather(1, block)
            if not includes_self:
                own, total = share_inside(q, k, asked.scale, positions, valid, block, total, self.pages.heads)
            for pool, fact, seat, of_pages in zip(pools, facts, seats, page_lse, strict=True):
                share = torch.zeros(fact.nowhere + 1, block.shape[1], device=valid.device)
                if own is not None and pool is pools[0]:  # new entries lie in the first pool
                    share.index_add_(0, fact.seat_of_new(slots).flatten(), own.flatten(0, 2))
                if of_pages is not None:
                    share.index_add_(0, seat, share_of_pages(take(of_pages, block), total, real, self.pages.heads))
                if policy.page_values and pool.num_pages:
                    values = {name: pool.counter(name) for name in policy.page_values}
                    policy.observe(values, fact.seen(share[:-1], run, real, columns.shape[1] - begin))
            if policy.observes_queries:
                policy.observe_queries(rows, asked.scale * take(q, block).float(), total, positions.gather(1, block))

    def _rows(self, layer: int, q: Tensor) -> dict[str, Tensor]:
        if layer not in self.columns:
            shapes = self.policies[0].row_values(*q.shape[2:])
            self.columns[layer] = {name: self.pages.rows.tensor(f"policy.{layer}.{name}", shape) for name, shape in shapes.items()}
        return {name: column.value for name, column in self.columns[layer].items()}


class _Run(NamedTuple):
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


class _Facts:
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
        self.clock = torch.nn.functional.pad(step.lens_after.repeat_interleave(heads), (0, 1))[self.row]  # [X], after this forward

    def seats_of(self, run: _Run) -> Tensor:
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

    def seen(self, share: Tensor, run: _Run, real: Tensor, to_come: int) -> Seen:
        """to_come: columns of the forward from the first of these on; padding comes first."""
        if run.num_rows < self.num_rows:
            real = torch.nn.functional.pad(real, (0, 0, run.row0, self.num_rows - run.row0 - run.num_rows))
        real = real.repeat_interleave(self.heads, 0)
        return Seen(share=share, row=self.row, real=real, entries=self.entries, page_size=self.page_size, time=self.clock - to_come)

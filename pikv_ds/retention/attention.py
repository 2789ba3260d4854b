"""Where attention goes: the share of every query's attention that each page got, from the lse of pages and the merged lse.

R request rows, S local shards, T queries per row, Hq query heads, X counters of a pool (pages/pool.py: one a page, or one a place in the
tables once rows share pages), C columns of a block table, H head tables: the kv heads when a page holds the entries of one head, else 1.
Nothing here reads the device back. Window layers are not watched.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from pikv_ds.pages.events import PageChange, PageMove
from pikv_ds.pages.layers import RankPages
from pikv_ds.pages.pool import PagePool
from pikv_ds.pages.rows import RowChange, RowColumn
from pikv_ds.pages.undoing import WAITING, Undoing, held_nbytes
from pikv_ds.policies.base import RetentionPolicy
from pikv_ds.step.query import LateLse
from pikv_ds.step.step import Step

from .looks import Facts, Looks, Run, Waiting
from .share_sums import share_inside, share_of_pages, take

BLOCK_ELEMENTS = 1 << 22  # of the scores inside a chunk that are held at a time


class Shares:
    """Shows policies what the queries of each layer attend to. Keeps nothing of a layer but what its policies keep per row.

    A row's clock is the number of its tokens, so that it is the same beside other rows, after padding, a fork or a crop.
    """

    def __init__(self, policies: Sequence[RetentionPolicy], pages: RankPages, who: str, *, nearest_only: bool = False) -> None:
        """policies: the first may keep values per row, the others keep values per page only. who: asks for it, as a user knows it.
        nearest_only: what lies behind never comes back, so nobody counts its attention."""
        self.policies, self.pages, self.nearest_only = tuple(policies), pages, nearest_only
        self.columns: dict[int, dict[str, RowColumn]] = {}  # layer -> what the policy keeps per row
        self.waiting: list[Waiting] = []  # of the last forward, if it was tentative
        self.lens: list[int] = []  # tokens of every row after it
        self.undoing: Undoing | None = None  # None: nobody watches
        if self.policies[0].watches:
            self.undoing = Undoing(pages.rows, "attention", who)
            for layer in pages.layers:
                layer.events.moved += (partial(self._moved, layer.index),)
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

    def start(self) -> None:
        """A new generation begins."""
        self.waiting.clear()

    def note(self, step: Step) -> None:
        """A forward ends."""
        self.lens = step.lens_after_host
        self.undoing.note(step, [step.tentative] * len(step.lens_after_host))

    @property
    def metadata_nbytes(self) -> int:
        """Bytes of what waits; what is kept per page and row is counted with pages and rows."""
        return held_nbytes(x for one in self.waiting for x in one.tensors)

    def settle(self, change: RowChange | None) -> None:
        """Another forward begins: show policies the queries of the last one that wait and stay. Before rows change."""
        waiting, self.waiting = self.waiting, []
        kept = self.undoing.kept(change, self.lens) if waiting else None
        for one in waiting:
            stays = one.looks.without(one.facts, one.run, kept, one.policy.window)
            self._show(one.policy, one.layer, one.facts, one.run, stays, kept)

    def _moved(self, layer: int, move: PageMove) -> None:
        """Pages have other ids: counters that lie at these move with them, and so does what waits for them."""
        pool, told = self.pages.layers[layer].pools[move.level], set()
        for i, one in enumerate(self.waiting):
            if one.layer == layer and pool.counts_by_page:
                fact, shares = one.facts[move.level], list(one.looks.shares)
                shares[move.level] = shares[move.level][move.source]
                self.waiting[i] = one._replace(looks=one.looks._replace(shares=tuple(shares)))
                if id(fact) not in told:  # policies share it
                    fact.row, fact.clock = fact.row[move.source], fact.clock[move.source]
                    told.add(id(fact))

    def rebuilt(self, change: PageChange) -> None:
        """Queries that the policy keeps go into the basis that the keys of their rows have now."""
        if change.basis is None or change.level:  # queries of pools behind are the layer's own
            return
        rows, by = change.basis
        kept, names = self.columns.get(change.layer, {}), self.policies[0].row_queries
        for x in (kept[name].value for name in names if name in kept):
            by_head = x[rows].unflatten(1, (by.shape[1], -1))
            x[rows] = torch.einsum("nhgr,nhrs->nhgs", by_head, by).flatten(1, 2)
        for one in self.waiting:
            if one.layer == change.layer and one.looks.queries:
                here = (rows >= one.run.row0) & (rows < one.run.row0 + one.run.num_rows)
                q, own = one.looks.queries[0], rows[here] - one.run.row0
                q[own] = torch.einsum("nbhgr,nhrs->nbhgs", q[own].unflatten(2, (by.shape[1], -1)), by[here]).flatten(2, 3)

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
        facts = [Facts(pool, step, evicted) for pool in pools]
        positions, slots = step.positions.view(num_sources, -1), asked.slots.view(num_sources, -1, heads)
        for sources in step.same_shape_runs():
            num_rows, at = sum(source.num_rows for source in sources), step.sources.index(sources[0])
            run = Run(sources[0].row0, num_rows, sources[0].num_columns, slice(at, at + len(sources)))
            page_lse = asked.page_lse.get(run.row0) or [None] * len(pools)
            for policy in self.policies if num_rows else ():
                self._observe(policy, asked, step, facts, run, run.of(positions), run.of(slots), page_lse, run.of(lse))

    def _observe(
        self, policy: RetentionPolicy, asked: LateLse, step: Step, facts: list[Facts], run: Run, positions: Tensor, slots: Tensor,
        page_lse: list[Tensor | None], lse: Tensor | None,
    ) -> None:  # fmt: skip
        """The queries of one run; facts and page_lse by pool."""
        pools, includes_self = self.pages.layers[asked.layer].pools, run.num_columns == 1
        q, k, valid = run.of(asked.q), run.of(asked.k), positions >= 0
        columns = torch.arange(run.num_columns, device=valid.device).expand_as(valid)
        if not step.all_valid and run.num_columns > 1:
            columns = valid.to(torch.int8).argsort(dim=-1, stable=True)  # padding first, then the queries of a row in their order
        taken_back = WAITING if step.tentative else 0
        columns = columns[:, -(policy.window or run.num_columns) - taken_back :]
        at_once = 1 if includes_self else max(1, BLOCK_ELEMENTS // (valid.numel() * q.shape[2]))
        k, last = k if includes_self else pools[0].reader.met(k, positions), columns.shape[1]
        begins, waits = [*range(0, last, at_once)], last if not taken_back else 0 if policy.window else max(0, last - taken_back)
        begins = sorted({*begins, waits} - {last})
        seats, waiting = [fact.seats_of(run) for fact in facts], []
        for begin, end in zip(begins, [*begins[1:], last], strict=True):
            block = columns[:, begin:end]
            own, total, real = None, take(lse, block), valid.gather(1, block)
            if not includes_self:
                own, total = share_inside(q, k, asked.scale, positions, valid, block, total, self.pages.heads)
            shares = []
            for pool, fact, seat, of_pages in zip(pools, facts, seats, page_lse, strict=True):
                share = torch.zeros(fact.nowhere + 1, block.shape[1], dtype=torch.float32, device=valid.device)
                if own is not None and pool is pools[0]:  # new entries lie in the first pool
                    share.index_add_(0, fact.seat_of_new(slots).flatten(), own.flatten(0, 2))
                if of_pages is not None:
                    share.index_add_(0, seat, share_of_pages(take(of_pages, block), total, real, self.pages.heads))
                shares.append(share[:-1])
            queries = (asked.scale * take(q, block).float(), total) if policy.observes_queries else ()
            looks = Looks(tuple(shares), torch.where(real, positions.gather(1, block), -1), queries, last - end)
            if begin < waits:
                self._show(policy, asked.layer, facts, run, looks)
            else:
                waiting.append(looks)
        if waiting:
            self.waiting.append(Waiting(policy, asked.layer, facts, run, Looks.joined(waiting)))

    def _show(self, policy: RetentionPolicy, layer: int, facts: list[Facts], run: Run, looks: Looks, kept: Tensor | None = None) -> None:
        """kept [R]: tokens that rows go on with; None: with all."""
        for pool, fact, share in zip(self.pages.layers[layer].pools, facts, looks.shares, strict=True):
            if policy.page_values and pool.num_pages:
                values = {name: pool.counter(name) for name in policy.page_values}
                policy.observe(values, fact.seen(share, run, looks, kept))
        if policy.observes_queries:
            q, lse = looks.queries
            rows = {name: x[run.row0 : run.row0 + run.num_rows] for name, x in self._rows(layer, q).items()}
            policy.observe_queries(rows, q, lse, looks.positions)

    def _rows(self, layer: int, q: Tensor) -> dict[str, Tensor]:
        if layer not in self.columns:
            shapes = self.policies[0].row_values(*q.shape[2:])
            self.columns[layer] = {
                name: self.pages.rows.tensor(f"policy.{layer}.{name}", shape, empties=True) for name, shape in shapes.items()
            }
        return {name: column.value for name, column in self.columns[layer].items()}

"""Where attention goes: the share of every query's attention that each page got, from the lse of pages and the merged lse.

R request rows, S local shards, T queries per row, Hq query heads, P pages of a layer's store, C columns of a block table, H head tables:
the kv heads when a page holds the entries of one head, else 1. Nothing here reads the device back. Window layers are not watched.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pikv_ds import ops
from pikv_ds.codecs.request_maps import Turn
from pikv_ds.pages.layers import Tables
from pikv_ds.pages.pool import LayerStore
from pikv_ds.pages.rows import RowColumn
from pikv_ds.pages.unrotated import attend
from pikv_ds.pages.view import Stored
from pikv_ds.policies.base import RetentionPolicy, Seen
from pikv_ds.step.step import StepPlan

from .shares import share_inside, share_of_pages, take

BLOCK_ELEMENTS = 1 << 22  # of the scores inside a chunk that are held at a time


class Waiting(NamedTuple):
    """A layer whose queries were answered and whose merged lse is still to come: q [G, N, Hq, Dk], k [G, N, Hkv, Dk] of every source,
    slots [G * N * H] int32 of the entries on this rank (-1 elsewhere), lse [n, Hq] f32 of this rank's own n tokens."""

    layer: int
    scale: float
    q: Tensor
    k: Tensor
    slots: Tensor
    lse: Tensor


class Mass:
    """Shows policies what the queries of each layer attend to. Between keep() and observe() it holds that layer's page lse.

    policies: the first may keep values per row; append others that keep values per page only.
    Time counts the query columns of a source since the generation began; forwards in which a source stores nothing do not count.
    """

    def __init__(self, policy: RetentionPolicy, tables: Tables) -> None:
        self.policies, self.tables = [policy], tables
        # By pool of pages and first row, [R, T, S, Hq, C]: what its queries saw, -inf where nothing was read. H > 1: of each head's table.
        self.page_lse: dict[tuple[LayerStore, int], Tensor] = {}
        self.times: list[int] = []  # per source
        self.num_rows: list[int] = []  # per source
        self.columns: dict[int, dict[str, RowColumn]] = {}  # layer -> what the policy keeps per row

    def reset(self) -> None:
        """A new generation begins."""
        self.times, self.num_rows, self.page_lse = [], [], {}

    def turned(self, layer: int, turn: Turn) -> None:
        """Queries that the policy keeps go into the basis that the keys of their rows have now."""
        kept, names = self.columns.get(layer, {}), self.policies[0].row_queries
        for x in (kept[name].value for name in names if name in kept):
            by_head = x[turn.rows].unflatten(1, (turn.by.shape[1], -1))
            x[turn.rows] = torch.einsum("nhgr,nhrs->nhgs", by_head, turn.by).flatten(1, 2)

    def follow(self, plan: StepPlan) -> None:
        """A forward begins."""
        self.times = self.times or [0] * len(plan.sources)
        self.num_rows = [source.num_rows for source in plan.sources]

    def advance(self, plan: StepPlan) -> None:
        """A forward ends."""
        for i, source in enumerate(plan.sources):
            self.times[i] += source.num_columns * any(plan.num_new[source.row0 : source.row0 + source.num_rows])

    def by_row(self, times: list[int]) -> Tensor:
        """A number per source -> [R * H, 1, 1] int64, H head tables."""
        each = [n for n, rows in zip(times, self.num_rows, strict=True) for _ in range(rows * self.tables.heads)]
        return torch.tensor(each, dtype=torch.int64).to(self.tables.device).view(-1, 1, 1)

    def rows_by_head(self, layer: int, num_tables: int) -> dict[str, Tensor]:
        """The layer's row values; with H head tables as [R * H, ...], the query heads of each among them."""
        rows = {name: column.value for name, column in self.columns.get(layer, {}).items() if column.used}
        if num_tables == 1:
            return rows
        return {
            name: x.unflatten(1, (num_tables, -1)).flatten(0, 1) if x.dim() > 1 else x.repeat_interleave(num_tables)
            for name, x in rows.items()
        }

    def keep(self, store: LayerStore, row0: int, page_lse: Tensor) -> None:
        """Page lse [R, T, S, Hq, C] of the queries of rows row0 ... in one store, for observe()."""
        self.page_lse[store, row0] = page_lse

    def shift(self, store: LayerStore, row0: int, shift: Tensor) -> None:
        """Add what linear maps left out of the lse that was kept, [R, T, Hq]."""
        self.page_lse[store, row0] = self.page_lse[store, row0] + shift[:, :, None, :, None]

    def read(self, store: LayerStore, q: Tensor, row0: int, stored: Stored, scale: float) -> tuple[Tensor, Tensor]:
        """Attention of q [R, T, Hq, Dk] to the entries of its rows in one store: out [R, T, Hq, Dv] f32, lse [R, T, Hq] f32.

        Each query reads its pages by itself, which gives the lse of every page with it; only reading a long chunk costs more that way.
        """
        num_rows, num_queries = q.shape[:2]
        watched = any(policy.watches for policy in self.policies)
        if store.turned is not None:  # keys are put together once for all queries of a row
            out, lse, page_lse = attend(store, q, stored, scale=scale)
            if watched:
                self.keep(store, row0, page_lse)
            return out, lse
        table, seqlens, tail_rows = stored.block_table, stored.seqlens, stored.tail_rows
        if num_queries > 1:
            table, seqlens = (_per_query(x, num_rows, num_queries) for x in (table, seqlens))
            tail_rows = None if tail_rows is None else _per_query(tail_rows, num_rows, num_queries)
        out, lse, page_lse = ops.decode(
            q.flatten(0, 1).contiguous(), store.pages, store.fmt, table, seqlens,
            scale=scale, with_page_lse=True, tail=stored.tail, tail_rows=tail_rows,
        )  # fmt: skip
        if watched:
            self.keep(store, row0, page_lse.unflatten(0, (num_rows, num_queries, -1)))
        return out.unflatten(0, (num_rows, num_queries)), lse.unflatten(0, (num_rows, num_queries))

    def observe(self, asked: Waiting, plan: StepPlan, lse: Tensor | None) -> None:
        """Account for the queries of one layer, once their partials have been merged over the ranks.

        Args: lse [G, N, Hq] over all stored entries that were read, None if there were none. In a forward of one column they include the
            query's own entry.
        """
        pools, num_sources = self.tables.pools(asked.layer), len(plan.sources)
        evicted = self.tables.directory.evicted[asked.layer].unflatten(-1, (-1, pools[0].heads)).sum(1)
        facts = [_Facts(store, plan, evicted) for store in pools]
        positions, slots = plan.positions.view(num_sources, -1), asked.slots.view(num_sources, -1, pools[0].heads)
        times = self.times or [0] * num_sources
        for sources in plan.same_shape_runs():
            first = plan.sources.index(sources[0])
            # Rows that began at another time are shown by themselves: a policy is told one time.
            alike = len(set(times[first : first + len(sources)])) == 1
            for part in [sources] if alike else [[source] for source in sources]:
                num_rows, at = sum(source.num_rows for source in part), plan.sources.index(part[0])
                run = _Run(part[0].row0, num_rows, part[0].num_columns, slice(at, at + len(part)), times[at])
                skipped = slice(run.row0 - sources[0].row0, run.row0 - sources[0].row0 + num_rows)
                page_lse = [self.page_lse.get((store, sources[0].row0)) for store in pools]
                page_lse = [None if x is None else x[skipped] for x in page_lse]
                for policy in self.policies if num_rows else ():
                    self._observe(policy, asked, plan, facts, run, run.of(positions), run.of(slots), page_lse, run.of(lse))
        self.page_lse = {}

    def _observe(
        self, policy: RetentionPolicy, asked: Waiting, plan: StepPlan, facts: list[_Facts], run: _Run, positions: Tensor, slots: Tensor,
        page_lse: list[Tensor | None], lse: Tensor | None,
    ) -> None:  # fmt: skip
        """The queries of one run; facts and page_lse by pool."""
        pools, includes_self = self.tables.pools(asked.layer), run.num_columns == 1
        q, k, valid = run.of(asked.q), run.of(asked.k), positions >= 0
        columns = torch.arange(run.num_columns, device=valid.device).expand_as(valid)
        if not plan.all_valid and run.num_columns > 1:
            columns = valid.to(torch.int8).argsort(dim=-1, stable=True)  # padding first, then the queries of a row in their order
        columns = columns[:, -(policy.window or run.num_columns) :]
        step = max(1, BLOCK_ELEMENTS // (valid.numel() * q.shape[2]))
        time, tables = run.time + run.num_columns - columns.shape[1], [fact.tables_of(run) for fact in facts]
        rows = self._rows(asked.layer, q) if policy.observes_queries else {}
        rows = {name: x[run.row0 : run.row0 + run.num_rows] for name, x in rows.items()}
        for begin in range(0, columns.shape[1], 1 if includes_self else step):
            block = columns[:, begin : begin + step]
            own, total, real = None, take(lse, block), valid.gather(1, block)
            if not includes_self:
                k = k if pools[0].turned is None else pools[0].turned.keys(k, positions)
                own, total = share_inside(q, k, asked.scale, positions, valid, block, total, pools[0].heads)
            for store, fact, table, of_pages in zip(pools, facts, tables, page_lse, strict=True):
                share = torch.zeros(fact.nowhere + 1, block.shape[1], device=valid.device)
                if own is not None and store is pools[0]:  # new entries lie in the first pool
                    page = torch.where(slots >= 0, slots // store.page_size, fact.nowhere)
                    share.index_add_(0, page.flatten(), own.flatten(0, 2))
                if of_pages is not None:
                    share.index_add_(0, table, share_of_pages(take(of_pages, block), total, real, store.heads))
                if policy.page_values and store.num_pages:
                    values = {name: store.summaries[name] for name in policy.page_values}
                    policy.observe(values, fact.seen(share[:-1], run, real, time + begin))
            if policy.observes_queries:
                policy.observe_queries(rows, asked.scale * take(q, block).float(), total, positions.gather(1, block))

    def _rows(self, layer: int, q: Tensor) -> dict[str, Tensor]:
        if layer not in self.columns:
            shapes = self.policies[0].row_values(*q.shape[2:])
            self.columns[layer] = {name: self.tables.rows.tensor(f"policy.{layer}.{name}", shape) for name, shape in shapes.items()}
        return {name: column.value for name, column in self.columns[layer].items()}


class _Run(NamedTuple):
    """Rows of neighbouring sources with as many columns, which are at the same time."""

    row0: int
    num_rows: int
    num_columns: int
    sources: slice
    time: int

    def of(self, x: Tensor | None) -> Tensor | None:
        """[G, N, ...] -> [R, T, ...] of these rows."""
        if x is None:
            return None
        tokens = self.num_rows * self.num_columns // (self.sources.stop - self.sources.start)
        return x[self.sources, :tokens].reshape(self.num_rows, self.num_columns, *x.shape[2:])


class _Facts:
    """What a Seen says about rows, the same for all its blocks of queries. With a page per head, the heads of a row count as rows."""

    def __init__(self, store: LayerStore, plan: StepPlan, evicted: Tensor) -> None:
        """evicted: [R, H] int64."""
        table, heads, self.nowhere = store.block_table, store.heads, store.num_pages
        self.table = torch.where(table >= 0, table, self.nowhere).view(-1).to(torch.int64)  # [R * S * H * C]
        num_rows = table.shape[0] * heads
        table = table.view(table.shape[0], -1, heads, table.shape[-1])
        rows = torch.arange(num_rows, device=table.device).view(-1, 1, heads, 1).expand_as(table).reshape(-1)
        nobody = torch.full((self.nowhere + 1,), -1, device=table.device)
        row = nobody.scatter_reduce_(0, self.table, rows, "amax")[:-1]
        self.row = torch.where(row >= 0, row, num_rows)
        self.entries = (plan.lens_after.unsqueeze(1) - evicted).flatten()
        self.page_size, self.heads, self.num_rows = store.page_size, heads, plan.lens_after.shape[0]

    def tables_of(self, run: _Run) -> Tensor:
        """[R * S * H * C] of the rows of a run."""
        return self.table.view(self.num_rows, -1)[run.row0 : run.row0 + run.num_rows].flatten()

    def seen(self, share: Tensor, run: _Run, real: Tensor, time: int) -> Seen:
        if run.num_rows < self.num_rows:
            real = torch.nn.functional.pad(real, (0, 0, run.row0, self.num_rows - run.row0 - run.num_rows))
        real = real.repeat_interleave(self.heads, 0)
        return Seen(share=share, row=self.row, real=real, entries=self.entries, page_size=self.page_size, time=time)


def _per_query(x: Tensor, num_rows: int, num_queries: int) -> Tensor:
    """[R * S, ...] of tables -> [R * T * S, ...]."""
    x = x.view(num_rows, 1, -1, *x.shape[1:]).expand(-1, num_queries, *[-1] * x.dim())
    return x.reshape(-1, *x.shape[3:]).contiguous()  # of one row and shard a reshape is a view

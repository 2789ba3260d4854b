"""What a query reads of the store: pinned pages and those that a router chooses, per kv head, over the shards of all ranks.

R rows, T queries per row, Q = R * T, S local shards, N = Q * S tables, C table columns, H kv heads, K listed pages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from pikv_ds.config.routing import RoutingConfig
from pikv_ds.exchange.exchange import Exchange
from pikv_ds.pages.layers import Tables
from pikv_ds.pages.unrotated import decode
from pikv_ds.pages.view import Stored
from pikv_ds.routers.base import PageQuery, Router
from pikv_ds.spec import LayerSpec
from pikv_ds.step.query import Query
from pikv_ds.step.step import StepPlan

from .best_pages import best_pages, by_column, listed_pages, page_keys
from .budget import Budget, NearPages, lens_seen, page_budget
from .extent import Extent, extent_of
from .news import RouterNews
from .returns import readers_of_shards
from .window_news import entries_by_page

QUERIES_AT_ONCE = 32  # per row: scores take Q * S * C * H numbers


class Selection:
    """Owns a router and the counters of entries read; borrows stores and exchange.

    measures_mass: also attend to everything, to learn how much of the attention the choice holds (for evaluation; slow).
    """

    def __init__(
        self,
        config: RoutingConfig,
        router: Router,
        layers: list[LayerSpec],
        tables: Tables,
        exchange: Exchange,
        stages: bool,
        keeps_all: bool,
        tiers: NearPages | None,
    ) -> None:
        """stages: entries are stored after the queries of their layer. keeps_all: nothing is ever evicted.

        tiers: layers have two pools of pages. Then the router chooses among far pages, and near pages are read by every query.
        """
        self.tiers = tiers
        self.config, self.router, self.layers, self.tables, self.exchange, self.stages = config, router, layers, tables, exchange, stages
        self.in_order = tables.num_shards == 1 and keeps_all and tiers is None  # without a window, entry i of a table is at position i
        self.page_size, self.num_shards, self.device = tables.page_size, tables.num_shards, tables.device
        self.entries = torch.zeros(2, dtype=torch.float64, device=self.device)  # read (mean over kv heads), visible: sums over queries
        self.mass = torch.zeros(2, dtype=torch.float64, device=self.device)  # share of attention read, queries
        self.measures_mass = False
        self.onlookers: tuple[Callable[[PageQuery, Tensor], None], ...] = ()  # shown every choice before it is read: tests, evaluation
        self.readers: Tensor | None = None  # of the latest read with returns_needed: [G, R * T, H] bool, ranks whose partials count
        self._plan: StepPlan | None = None
        self._budgets: dict[int | None, Budget] = {}
        self._counted: tuple[Tensor, Tensor, Tensor, Tensor] | None = None  # entries of an extent, and what counting derives from them
        self._extents: dict[tuple[int, int, int], Extent] = {}  # what is the same in every layer of a forward, by rows and first query
        self.news = RouterNews(router, tables, stages)
        self.open()

    def open(self) -> None:
        """The stores are new and empty. Host phase."""
        self.entries.zero_()
        self.mass.zero_()
        self._forget_step()
        self.news.open()

    def end_step(self) -> None:
        """A forward ends: the router is told of its late entries, and what is the same in its layers is dropped."""
        self.news.settle()
        self._forget_step()

    def _forget_step(self) -> None:
        self.readers = self.router.chosen = self._plan = self._counted = None
        self._budgets, self._extents = {}, {}

    @property
    def metadata_nbytes(self) -> int:
        """Bytes of the counters; what the router keeps is counted with pages and rows."""
        return self.entries.nbytes + self.mass.nbytes

    def read(
        self,
        query: Query,
        q: Tensor,
        row0: int,
        positions: Tensor,
        stored: Stored,
        plan: StepPlan,
        near: tuple[Stored, Tensor] | None = None,
        *,
        with_page_lse: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Attention to the chosen pages.

        Args:
            q [R, T, Hq, Dk] at positions [R, T] int32, of the rows row0 ...; stored: their tables.
            near: what the queries read besides, and its lse [R, T, Hq]: it takes its share of the budget and counts as read.

        Returns: out [R, T, Hq, Dv] f32, lse [R, T, Hq] f32; with_page_lse: page lse [R, T, S, Hq, C] f32, -inf for pages that were not
        read, C columns of stored.block_table. Sync: none. Collectives with several ranks, per QUERIES_AT_ONCE queries of a row: one for a
        budget, and those of the router; all ranks must call it alike.
        """
        num_rows, parts, readers = q.shape[0], [], []
        rows = slice(row0, row0 + num_rows)
        if plan is not self._plan:
            self._plan, self._budgets, self._extents = plan, {}, {}
        for begin in range(0, q.shape[1], QUERIES_AT_ONCE):
            block = slice(begin, begin + QUERIES_AT_ONCE)
            asked = self._asked(query, q[:, block], rows, stored, positions, begin, plan)
            held = None if near is None else entries_by_page(near[0], asked, self.page_size)
            if near is not None:
                asked = replace(asked, near_lse=near[1][:, begin : begin + QUERIES_AT_ONCE].flatten(0, 1))
                self.entries += held.flatten(1).sum(1, dtype=torch.float64) @ real_queries(asked)
            page_list = self.choose(asked, plan) if near is None else self.choose(asked, plan, held)
            for look in self.onlookers:
                look(asked, page_list)
            self._count(asked, page_list)
            if self.readers is not None:
                readers.append(self.readers.unflatten(1, (num_rows, -1)))
            out, lse, page_lse = self._attend(asked, page_list, self.router.wants_page_lse or with_page_lse)
            if self.measures_mass:
                read, whole = lse, self._attend(asked, None)[1]
                if near is not None:
                    read, whole = torch.logaddexp(read, asked.near_lse), torch.logaddexp(whole, asked.near_lse)
                share = torch.exp(read - asked.gather(whole).logsumexp(0)).mean(1, dtype=torch.float64)
                self.mass += torch.stack([share.nan_to_num(0.0) @ real_queries(asked), real_queries(asked).sum() / self.exchange.size])
            if self.router.wants_page_lse:
                self.router.answered(asked, page_list, page_lse)
            part = [out.view(num_rows, -1, *out.shape[1:]), lse.view(num_rows, -1, lse.shape[1])]
            if with_page_lse:
                part.append(
                    by_column(page_lse, page_list, stored.block_table.shape[-1]).unflatten(0, (num_rows, -1, self.tables.num_local))
                )
            parts.append(part)
        self.readers = torch.cat(readers, 2).flatten(1, 2) if readers else None
        whole = parts[0] if len(parts) == 1 else [torch.cat(pieces, 1) for pieces in zip(*parts, strict=True)]
        return whole[0], whole[1], whole[2] if with_page_lse else None

    def choose(self, asked: PageQuery, plan: StepPlan, near: Tensor | None = None) -> Tensor:
        """Columns to read, [N, 1 or H, K] int32, -1 = none. near: entries of the near pages [Q, S, C'], read besides."""
        num_queries, num_local, columns = asked.visible.shape
        score = self.router.score(asked).view(num_queries, num_local, -1, columns)
        hidden, pinned = asked.hidden, asked.pinned
        if near is not None:  # near pages take part as pinned ones, so that the budget is one over both pools and all ranks
            score = torch.nn.functional.pad(score, (0, near.shape[-1]))
            hidden, pinned = torch.cat([hidden, near == 0], -1), torch.cat([pinned, near > 0], -1)
        page_list = self._listed(asked, plan, page_keys(score, hidden, pinned, self.tables.map), num_local)
        return page_list if near is None else torch.where(page_list < columns, page_list, -1)

    def _listed(self, asked: PageQuery, plan: StepPlan, keys: Tensor, num_local: int) -> Tensor:
        num_queries = asked.positions.numel()
        self.readers = None
        if not self.router.budgeted:
            if self.returns_needed(plan):
                self.readers = readers_of_shards(self.router.chosen, asked, self.config)
            return listed_pages(keys, num_local)
        budget = self._budget(asked.layer, plan)
        pages = (
            None
            if budget.pages is None
            else budget.pages[asked.rows].repeat_interleave(num_queries // (asked.rows.stop - asked.rows.start), output_size=num_queries)
        )
        what = f"choosing the pages of layer {asked.layer} over all ranks"
        page_list, readers = best_pages(keys, pages, budget.width, num_local, self.exchange, what)
        self.readers = readers if self.returns_needed(plan) else None
        return page_list

    def returns_needed(self, plan: StepPlan) -> bool:
        """Partials go back only from ranks that read something. Replicated requests have one source, and every rank needs all partials."""
        return self.config.exchange == "needed" and len(plan.sources) > 1

    def _attend(self, asked: PageQuery, page_list: Tensor | None, with_page_lse: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        return decode(
            asked.store, asked.q, asked.stored, scale=asked.scale, page_list=page_list, q_positions=asked.positions, window=asked.window,
            with_page_lse=with_page_lse,
        )  # fmt: skip

    def _asked(self, query: Query, q: Tensor, rows: slice, stored: Stored, positions: Tensor, begin: int, plan: StepPlan) -> PageQuery:
        """The tables of R rows, once per query. q [R, T, Hq, D] are the queries from column `begin` of positions [R, all T] on."""
        store, window = self.news.store(query.layer), self.layers[query.layer].window
        num_rows, num_queries, num_q_heads, dim = q.shape
        columns = min(max(plan.lens_after_host) // self.page_size + 1, stored.block_table.shape[-1])  # a table may have spare ones
        per_query = lambda x: x if num_queries == 1 else _repeat(x, num_rows, num_queries)  # noqa: E731
        table, lens = per_query(stored.block_table[..., :columns]).contiguous(), per_query(stored.seqlens)
        at = positions[:, begin : begin + num_queries].flatten().contiguous()
        same_everywhere, key = self.in_order and window is None, (rows.start, rows.stop, begin)
        extent = self._extents.get(key) if same_everywhere else None
        if extent is None:
            extent = extent_of(store, table, lens.view(-1, self.tables.num_local, 1), at.view(-1, 1, 1), self.config, window, self.in_order)
            if same_everywhere:
                self._extents[key] = extent
        return PageQuery(
            layer=query.layer, rows=rows, q=q.reshape(-1, num_q_heads, dim).contiguous(), positions=at, store=store, block_table=table,
            seqlens=lens, tail=stored.tail, tail_rows=None if stored.tail is None else per_query(stored.tail_rows), **extent._asdict(),
            map=self.tables.map, homes=None if self.num_shards == 1 else self.tables.directory.shard_at[query.layer][rows],
            window=window, scale=query.scale, gather=self.gather,
        )  # fmt: skip

    def gather(self, x: Tensor) -> Tensor:
        """x of the same shape on all ranks -> [ranks, ...]. A collective when there are several."""
        if self.exchange.size == 1:
            return x.unsqueeze(0)
        return self.exchange.all_gather(x.contiguous(), f"gathering for pikv.routing.method = {self.config.method!r}")

    def _budget(self, layer: int, plan: StepPlan) -> Budget:
        """Once per forward and window."""
        spec = self.layers[layer]
        if spec.window not in self._budgets:
            seen = [spec.tokens_kept(n) for n in lens_seen(plan, self.stages)]
            near = self.tiers if self.tables.far[layer] is not None else None
            self._budgets[spec.window] = page_budget(self.config, seen, self.page_size, self.num_shards, self.device, near)
        return self._budgets[spec.window]

    def _count(self, asked: PageQuery, page_list: Tensor) -> None:
        num_queries, _, columns = asked.entries.shape
        if self._counted is None or self._counted[0] is not asked.entries:
            padded = torch.nn.functional.pad(asked.entries.to(torch.float64), (0, 1)).view(-1, 1, columns + 1)  # -1 in a list finds the 0
            real = real_queries(asked)
            self._counted = (asked.entries, padded, real, padded.view(num_queries, -1).sum(1) @ real)
        _, padded, real, visible = self._counted
        read = padded.expand(-1, page_list.shape[1], -1).gather(-1, page_list.remainder(columns + 1).to(torch.int64))
        self.entries += torch.stack([read.view(num_queries, -1).sum(1) @ real / page_list.shape[1], visible])


def _repeat(x: Tensor, num_rows: int, num_queries: int) -> Tensor:
    """[R * S, ...] -> [R * T * S, ...]: the shards of a row once per query."""
    by_row = x.unflatten(0, (num_rows, 1, -1))
    return by_row.expand(-1, num_queries, *[-1] * x.dim()).flatten(0, 2).contiguous()  # of one row and shard that is a view


def real_queries(asked: PageQuery) -> Tensor:
    """[Q] f64, 1 for a query and 0 for padding."""
    return (asked.positions >= 0).to(torch.float64)

"""What a query reads of the pool: pinned pages and those that a router chooses, per kv head, over the shards of all ranks.

R rows, T queries per row, Q = R * T, S local shards, N = Q * S tables, C table columns, H kv heads, K listed pages.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from pikv_ds import ops
from pikv_ds.config.routing import RoutingConfig
from pikv_ds.exchange.exchange import Exchange
from pikv_ds.pages.layers import RankPages
from pikv_ds.pages.rows import RowChange
from pikv_ds.pages.undoing import Undoing, held_nbytes
from pikv_ds.pages.view import PageView, Read, per_query
from pikv_ds.routers.base import PageQuery, Router, scores_of
from pikv_ds.step.query import Query
from pikv_ds.step.step import Step

from .best_pages import best_pages, by_column, listed_pages, page_keys
from .budget import Budget, NearPages, page_budget
from .extent import entries_beside, extent_of
from .found import Beside, Choice, Found
from .news import RouterNews
from .page_routes import PageRoutes
from .returns import readers_of_shards

Counted = tuple[Tensor, Tensor, Tensor]
"""Of some queries: entries of every column and 0, [Q * S, 1, C + 1], which are real [Q], entries that they see, 0-d. f64."""

QUERIES_AT_ONCE = 32  # per row: scores take Q * S * C * H numbers


class Selection:
    """Owns a router and the counters of entries read; borrows pools and exchange.

    measures_mass: also attend to everything, to learn how much of the attention the choice holds (for evaluation; slow).
    """

    def __init__(
        self, config: RoutingConfig, router: Router, pages: RankPages, exchange: Exchange, keeps_all: bool, window: NearPages | None
    ) -> None:
        """keeps_all: nothing is ever evicted. window: layers have pools besides that of the router, which every query reads."""
        self.config, self.router, self.pages, self.exchange, self.window = config, router, pages, exchange, window
        self.in_order = pages.num_shards == 1 and keeps_all and window is None  # without a window, entry i of a table is at position i
        self.page_size, self.num_shards, self.device = pages.page_size, pages.num_shards, pages.device
        self.block_size = config.block_size or pages.page_size
        self.blocks = self.page_size // self.block_size
        self.entries = torch.zeros(2, dtype=torch.float64, device=self.device)  # read (mean over kv heads), visible: sums over queries
        self.mass = torch.zeros(2, dtype=torch.float64, device=self.device)  # share of attention read, queries
        self.measures_mass = False
        self._uncounted: list[tuple[Counted, Tensor]] = []  # page lists of the running forward
        self.onlookers: tuple[Callable[[PageQuery, Tensor], None], ...] = ()  # shown every choice before it is read: tests, evaluation
        self.routes: PageRoutes | None = None  # None: no rank knows which pages of other ranks its queries read
        if PageRoutes.serves(router, config, pages, exchange):
            self.routes = PageRoutes(router, config, pages, exchange)
        self.news = RouterNews(router, pages, self.routes)
        self.undoing: Undoing | None = None  # None: the router keeps nothing that a crop could take back
        if router.learns:
            self.undoing = Undoing(pages.rows, "router", f"pikv.routing.method = {router.name!r}")
        self.lens: list[int] = []  # tokens of every row after the last forward
        self.start()

    def start(self) -> None:
        """The pools are new and empty. Host phase."""
        self.entries.zero_()
        self.mass.zero_()
        self._uncounted = []
        self.news.start()
        for memory in self.router.memories:
            memory.clear()

    @contextmanager
    def shown_to(self, look: Callable[[PageQuery, Tensor], None]) -> Iterator[None]:
        """Inside, `look` is shown every choice before it is read."""
        before, self.onlookers = self.onlookers, (*self.onlookers, look)
        try:
            yield
        finally:
            self.onlookers = before

    def end_step(self) -> None:
        """A forward ends: the router is told of its late entries, and what was read is counted, of all layers in one."""
        self.news.flush()
        uncounted, self._uncounted = self._uncounted, []
        while uncounted:
            (padded, real, visible), first = uncounted[0]
            same = [listed for counted, listed in uncounted if counted[0] is padded and listed.shape == first.shape]
            uncounted = [each for each in uncounted if each[0][0] is not padded or each[1].shape != first.shape]
            index = torch.stack(same).remainder(padded.shape[-1]).to(torch.int64)  # [n, Q, 1, K]
            read = padded.expand(len(same), *padded.shape).gather(-1, index).flatten(2).sum(2) @ real
            self.entries += torch.stack([read.sum(), visible * len(same)])

    def note(self, step: Step) -> None:
        """A forward ends, and the router has been told of it."""
        self.lens = step.lens_after_host
        waits = [step.tentative and not step.sees_own(source) for source in step.sources for _ in range(source.num_rows)]
        self.undoing.note(step, waits)

    def settle(self, change: RowChange | None) -> None:
        """Another forward begins: the router learns what stays of the last one. Before rows change."""
        if self.waiting:
            kept = self.undoing.kept(change, self.lens)
            self.news.settle(kept)
            for memory in self.router.memories:
                memory.settle(kept)

    @property
    def watched(self) -> bool:
        """Whether somebody wants to see whole choices, or what they leave out."""
        return self.measures_mass or bool(self.onlookers)

    @property
    def waiting(self) -> list[Tensor]:
        """What waits for it."""
        return self.news.waiting + [x for memory in self.router.memories for x in memory.waiting]

    @property
    def metadata_nbytes(self) -> int:
        """Bytes of the counters and of what waits; what the router keeps is counted with pages and rows."""
        return self.entries.nbytes + self.mass.nbytes + held_nbytes(self.waiting) + (0 if self.routes is None else self.routes.nbytes)

    def read(
        self,
        step: Step,
        query: Query,
        q: Tensor,
        row0: int,
        positions: Tensor,
        view: PageView,
        beside: Beside | None = None,
        *,
        with_page_lse: bool = False,
    ) -> Found:
        """Attention to the chosen pages.

        Args:
            q [R, T, Hq, Dk] at positions [R, T] int32, of the rows row0 ...; view: their tables in the pool that is chosen from.
            beside: what the queries read of other pools: it takes its share of the budget and counts as read.

        with_page_lse: page_lse has one element, [R, T, S, Hq, C], C columns of the view. Sync: none. Collectives with several ranks, per
        QUERIES_AT_ONCE queries of a row: one for a budget, and those of the router; all ranks must call it alike.
        """
        num_rows, parts, readers = q.shape[0], [], []
        for memory in self.router.memories:
            memory.tentative = step.tentative
        rows = slice(row0, row0 + num_rows)
        for begin, end in blocks(q.shape[1]):
            asked, key = self._asked(step, query, q[:, begin:end], rows, view, positions, begin)
            near = None
            if beside is not None:
                num_queries = asked.positions.numel() // num_rows
                near = [entries_beside(other, num_rows, num_queries, self.block_size, self.blocks) for other in beside.views]
                near = torch.cat(near, -1) if near else asked.entries[..., :0]
                asked = replace(asked, near_lse=beside.lse[:, begin:end].flatten(0, 1))
                self.entries += near.flatten(1).sum(1, dtype=torch.float64) @ real_queries(asked)
            choice = self.choose(step, asked, near)
            for look in self.onlookers:
                look(asked, choice.columns)
            self._count(step, asked, choice.columns, key)
            read = self._attend(asked, choice.columns, self.router.wants_page_lse or with_page_lse)
            if self.measures_mass:
                self._measure(asked, read, near is not None)
            if self.router.wants_page_lse:
                self.router.answered(asked, choice.columns, read.page_lse)
            if choice.readers is not None:
                readers.append(choice.readers.unflatten(1, (num_rows, -1)))
            part = [read.out.view(num_rows, -1, *read.out.shape[1:]), read.lse.view(num_rows, -1, read.lse.shape[1])]
            if with_page_lse:
                of_pages = by_column(read.page_lse, choice.columns, view.block_table.shape[-1] * self.blocks)
                if self.blocks > 1:
                    of_pages = of_pages.unflatten(-1, (-1, self.blocks)).logsumexp(-1)
                part.append(of_pages.unflatten(0, (num_rows, -1, self.pages.num_local)))
            parts.append(part)
        out, lse, *page_lse = parts[0] if len(parts) == 1 else (torch.cat(pieces, 1) for pieces in zip(*parts, strict=True))
        return Found(out, lse, tuple(page_lse), torch.cat(readers, 2).flatten(1, 2) if readers else None)

    def choose(self, step: Step, asked: PageQuery, near: Tensor | None = None) -> Choice:
        """Columns to read. near: entries of the near pages [Q, S, C'], read besides."""
        num_queries, num_local, columns = asked.visible.shape
        named = None if self.router.budgeted else self.router.chosen_shards(asked)
        score = self.router.score(asked) if named is None else scores_of(named, asked)
        score, hidden, pinned = score.view(num_queries, num_local, -1, columns), asked.hidden, asked.pinned
        if near is not None:  # near pages take part as pinned ones, so that the budget is one over all pools and all ranks
            score = torch.nn.functional.pad(score, (0, near.shape[-1]))
            hidden, pinned = torch.cat([hidden, near == 0], -1), torch.cat([pinned, near > 0], -1)
        if self.blocks > 1 and near is None and num_local == 1 and self.exchange.size == 1:
            pages, width = self.budget_of(step, asked)
            return Choice(ops.choose_pages(score.squeeze(1), hidden.squeeze(1), pinned.squeeze(1), pages, width))
        keys, needed = page_keys(score, hidden, pinned, self.pages.map), self.returns_needed(step)
        if named is not None:
            choice = Choice(listed_pages(keys, num_local), readers_of_shards(named, asked, self.config) if needed else None)
        else:
            pages, width = self.budget_of(step, asked)
            what = f"choosing the pages of layer {asked.layer} over all ranks"
            choice = best_pages(keys, pages, width, num_local, self.exchange, what)
            if choice.readers is not None and not needed:
                choice = Choice(choice.columns)
        if asked.pool.foresees and num_queries == asked.rows.stop - asked.rows.start:
            asked.pool.reader.expect(score, hidden)
        if near is None:
            return choice
        return choice._replace(columns=torch.where(choice.columns < columns, choice.columns, -1))

    def returns_needed(self, step: Step) -> bool:
        """Partials go back only from ranks that read something. Replicated requests have one source, and every rank needs all partials."""
        sizes = self.config.exchange == "needed" or (self.config.exchange == "routed" and self.exchange.short_messages)
        return sizes and len(step.sources) > 1

    def gather(self, x: Tensor) -> Tensor:
        """x of the same shape on all ranks -> [ranks, ...]. A collective when there are several."""
        if self.exchange.size == 1:
            return x.unsqueeze(0)
        return self.exchange.all_gather(x.contiguous(), f"gathering for pikv.routing.method = {self.config.method!r}")

    def _attend(self, asked: PageQuery, columns: Tensor | None, page_lse: bool = False) -> Read:
        return asked.pool.reader.attend_listed(
            asked.q,
            asked.view,
            columns,
            scale=asked.scale,
            window=asked.window,
            q_positions=asked.positions,
            page_lse=page_lse,
            block_size=self.block_size,
        )

    def _asked(
        self, step: Step, query: Query, q: Tensor, rows: slice, view: PageView, positions: Tensor, begin: int
    ) -> tuple[PageQuery, Hashable | None]:
        """The tables of R rows, once per query; and the name of what is the same for these queries in all layers, if anything is.

        q [R, T, Hq, D] are the queries from column `begin` of positions [R, all T] on.
        """
        pool, window = self.pages.layers[query.layer].routed, self.pages.specs[query.layer].window
        num_rows, num_queries, num_q_heads, dim = q.shape
        columns = min(max(step.lens_after_host) // self.page_size + 1, view.block_table.shape[-1])  # a table may have spare ones
        table, lens, tail_rows = view.block_table[..., :columns], view.seqlens, view.tail_rows
        if num_queries > 1:
            table, lens = (per_query(x, num_rows, num_queries) for x in (table, lens))
            tail_rows = None if tail_rows is None else per_query(tail_rows, num_rows, num_queries)
        table, page_table = table.contiguous(), None
        if self.blocks > 1:
            page_table = table
            table = (table.unsqueeze(-1) * self.blocks + torch.arange(self.blocks, dtype=torch.int32, device=table.device)).flatten(2)
        at = positions if positions.shape[1] == num_queries else positions[:, begin : begin + num_queries]
        at = at.flatten().contiguous()

        def extent():
            return extent_of(pool, table, lens.view(-1, self.pages.num_local, 1), at.view(-1, 1, 1), self.config, window, self.in_order)

        key = (rows.start, rows.stop, begin) if self.in_order and window is None else None
        where = extent() if key is None else step.once(("extent", key), extent)
        asked = PageQuery(
            layer=query.layer, rows=rows, q=q.reshape(-1, num_q_heads, dim).contiguous(), positions=at, pool=pool, block_table=table,
            seqlens=lens, tail=view.tail, tail_rows=tail_rows,
            **where._asdict(), map=self.pages.map,
            homes=None if self.num_shards == 1 else self.pages.directory.shard_at[query.layer][rows],
            window=window, scale=query.scale, gather=self.gather, page_table=page_table,
        )  # fmt: skip
        return asked, key

    def budget_of(self, step: Step, asked: PageQuery) -> tuple[Tensor | None, int]:
        """Of each query, [Q] int64 or None, and the width: selection/budget.py."""
        (pages, width), num_queries = self.budget(step, asked.layer), asked.positions.numel()
        if pages is not None:
            each = num_queries // (asked.rows.stop - asked.rows.start)
            pages = pages[asked.rows].repeat_interleave(each, output_size=num_queries)
        return pages, width

    def budget(self, step: Step, layer: int) -> Budget:
        """Once per forward and window."""
        spec, near = self.pages.specs[layer], self.window if len(self.pages.layers[layer].pools) > 1 else None

        def budget() -> Budget:
            seen = [spec.tokens_kept(n) for n in step.lens_seen]
            return page_budget(self.config, seen, self.block_size, self.num_shards, self.device, near)

        return step.once(("budget", spec.window), budget)

    def _count(self, step: Step, asked: PageQuery, page_list: Tensor, key: Hashable | None) -> None:
        num_queries, num_local, columns = asked.entries.shape

        def facts() -> Counted:
            padded = torch.nn.functional.pad(asked.entries.to(torch.float64), (0, 1)).view(-1, 1, columns + 1)  # -1 in a list finds the 0
            real = real_queries(asked)
            return padded, real, padded.view(num_queries, -1).sum(1) @ real

        padded, real, visible = counted = facts() if key is None else step.once(("counted", key), facts)
        if key is not None and step.decode and num_local == 1 and page_list.shape[1] == 1:
            self._uncounted.append((counted, page_list))  # whole numbers, so that the order of adding does not matter
            return
        read = padded.expand(-1, page_list.shape[1], -1).gather(-1, page_list.remainder(columns + 1).to(torch.int64))
        self.entries += torch.stack([read.view(num_queries, -1).sum(1) @ real / page_list.shape[1], visible])

    def _measure(self, asked: PageQuery, read: Read, beside: bool) -> None:
        """How much of the attention to everything lies on what was read."""
        lse, whole = read.lse, self._attend(asked, None).lse
        if beside:
            lse, whole = torch.logaddexp(lse, asked.near_lse), torch.logaddexp(whole, asked.near_lse)
        share = torch.exp(lse - asked.gather(whole).logsumexp(0)).mean(1, dtype=torch.float64)
        self.mass += torch.stack([share.nan_to_num(0.0) @ real_queries(asked), real_queries(asked).sum() / self.exchange.size])


def blocks(num_queries: int) -> list[tuple[int, int]]:
    """Columns of a forward, QUERIES_AT_ONCE at a time and the odd ones first: rows are padded there, so that padding moves no block."""
    if num_queries <= QUERIES_AT_ONCE:
        return [(0, num_queries)]
    begins = [0, *range(num_queries % QUERIES_AT_ONCE or QUERIES_AT_ONCE, num_queries, QUERIES_AT_ONCE)]
    return list(zip(begins, [*begins[1:], num_queries], strict=True))


def real_queries(asked: PageQuery) -> Tensor:
    """[Q] f64, 1 for a query and 0 for padding."""
    return (asked.positions >= 0).to(torch.float64)

"""Which pages a query reads: pinned pages and the best others up to a budget, per kv head, over the shards of all ranks.

R rows, T queries per row, Q = R * T, S local shards, C table columns, H kv heads, K entries of a page list, P entries per page.
"""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from pikv_ds import ops

from .config import RoutingConfig
from .exchange import Exchange
from .plan import StepPlan
from .reader import Stored
from .routers.base import PageQuery, Router
from .spec import LayerSpec
from .step import Query
from .store import LayerStore
from .tables import Tables
from .writer import Written

QUERIES_AT_ONCE = 32  # per row: scores take Q * S * C * H numbers
PINNED = 0x7FFFFFFF  # in place of a score: above every float
NOTHING = torch.iinfo(torch.int64).min  # key of a page that must not be read


class Budget(NamedTuple):
    """Pages to read in one forward. pages: [R] int64 per row, pinned ones included; width: host bound of what a query can get."""

    pages: Tensor
    width: int


class Selection:
    """Owns what a router keeps between steps and the counters of entries read; borrows stores and exchange.

    The order of pages is (pinned, score, lower shard, lower column): total, so the choice is the same on any number of ranks.
    """

    def __init__(
        self, config: RoutingConfig, router: Router, layers: list[LayerSpec], tables: Tables, exchange: Exchange, stages: bool
    ) -> None:
        """stages: entries are stored after the queries of their layer."""
        self.config, self.router, self.layers, self.tables, self.exchange, self.stages = config, router, layers, tables, exchange, stages
        self.page_size, self.num_shards, self.device = tables.page_size, tables.num_shards, tables.device
        self.entries = torch.zeros(2, dtype=torch.float64, device=self.device)  # read (mean over kv heads), visible: sums over queries
        self._waiting: list[tuple[int, LayerStore, Tensor, Tensor]] = []
        self._plan: StepPlan | None = None
        self._budgets: dict[int | None, Budget] = {}
        self.open()

    def open(self) -> None:
        """The stores are new and empty. Host phase."""
        self._waiting.clear()
        self.entries.zero_()
        for layer, store in enumerate(self.tables.stores):
            self.router.open(layer, store)

    # ---- after an append -----------------------------------------------------------------------------------------------------

    def wrote(self, layer: int, plan: StepPlan, written: Written) -> None:
        """Entries of a layer were stored: those that queries of their own forward must not see wait until these have been answered."""
        self.settle()
        store = self.tables.stores[layer]
        slots, rows = written.slot_mapping, plan.rows
        if written.shard is not None:
            rows = rows * self.tables.num_local + torch.where(written.here, written.shard, 0)
        rows = rows.to(torch.int32)
        if plan.decode or self.stages:  # staged entries are stored after the queries of their layer
            self.router.wrote(layer, store, slots, rows)
            return
        if any(source.num_columns == 1 and source.num_rows for source in plan.sources):
            now = plan.one_column[plan.rows]
            self.router.wrote(layer, store, torch.where(now, slots, -1), rows)
            slots = torch.where(now, -1, slots)
        self._waiting.append((layer, store, slots, rows))

    def settle(self) -> None:
        """Report the entries that the queries of their own forward must not see. Call it before pages move."""
        for entry in self._waiting:
            self.router.wrote(*entry)
        self._waiting.clear()

    # ---- reading -------------------------------------------------------------------------------------------------------------

    def read(self, query: Query, q: Tensor, row0: int, positions: Tensor, stored: Stored, plan: StepPlan) -> tuple[Tensor, Tensor]:
        """Attention to the chosen pages.

        Args: q [R, T, Hq, Dk] at positions [R, T] int32, of the rows row0 ...; stored: their tables.

        Returns: out [R, T, Hq, Dv] f32, lse [R, T, Hq] f32. Sync: none. One collective per QUERIES_AT_ONCE queries of a row when there
        are several ranks; all must call it alike.
        """
        store, num_rows, parts = self.tables.stores[query.layer], q.shape[0], []
        budget = self._budget(query.layer, plan)
        for begin in range(0, q.shape[1], QUERIES_AT_ONCE):
            block = slice(begin, begin + QUERIES_AT_ONCE)
            asked = self._asked(store, query, q[:, block], stored, positions[:, block])
            pages = budget.pages[row0 : row0 + num_rows, None].expand(-1, asked.q.shape[0] // num_rows).flatten()
            page_list = self.choose(asked, pages, budget.width)
            self._count(asked, page_list)
            out, lse, _ = ops.decode(
                asked.q, store.pages, store.fmt, asked.block_table, asked.seqlens, scale=query.scale, page_list=page_list,
                q_positions=asked.positions, window=self.layers[query.layer].window, tail=asked.tail, tail_rows=asked.tail_rows,
            )  # fmt: skip
            parts.append((out.view(num_rows, -1, *out.shape[1:]), lse.view(num_rows, -1, lse.shape[1])))
        return parts[0] if len(parts) == 1 else (torch.cat([out for out, _ in parts], 1), torch.cat([lse for _, lse in parts], 1))

    def choose(self, asked: PageQuery, budget: Tensor, width: int) -> Tensor:
        """Columns to read, [N, H, K] int32, -1 = none. Args: budget [Q] int64 pages, pinned included; width: most that a query gets."""
        keys = self._keys(asked)  # [Q, H, S * C]
        local, index = keys.topk(min(width, keys.shape[-1]))
        best = local
        if self.exchange.size > 1:
            own = torch.nn.functional.pad(local, (0, width - local.shape[-1]), value=NOTHING)
            gathered = self.exchange.all_gather(own.contiguous(), f"choosing the pages of layer {asked.layer} over all ranks")
            best = gathered.permute(1, 2, 0, 3).flatten(2).topk(width).values
        num_pinned = (best >> 32 == PINNED).sum(-1)
        wanted = torch.maximum(budget.unsqueeze(-1), num_pinned).clamp(1, best.shape[-1])
        chosen = (local >= best.gather(-1, (wanted - 1).unsqueeze(-1))) & (local != NOTHING)
        num_shards, columns = asked.visible.shape[1:]
        if num_shards == 1:
            return torch.where(chosen, index, -1).to(torch.int32)
        shard = torch.arange(num_shards, device=index.device).view(1, -1, 1, 1)
        here = chosen.unsqueeze(1) & (index.div(columns, rounding_mode="floor").unsqueeze(1) == shard)
        return torch.where(here, index.unsqueeze(1) % columns, -1).to(torch.int32).flatten(0, 1)

    def _keys(self, asked: PageQuery) -> Tensor:
        """[Q, H, S * C] int64 that order the pages; unique, so that a top-k has no ties."""
        num_queries, num_shards, columns = asked.visible.shape
        score = self.router.score(asked).view(num_queries, num_shards, -1, columns) + 0.0  # one zero, not two
        bits = score.view(torch.int32)
        order = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # ascends with the float
        last_position = asked.positions.view(-1, 1, 1)
        pinned = (asked.first < self.config.sink_tokens) | (asked.last > last_position - self.config.recent_tokens)
        order = torch.where(pinned.unsqueeze(2), PINNED, order).to(torch.int64)
        shard = torch.arange(asked.shard_begin, asked.shard_begin + num_shards, device=order.device)
        place = shard.unsqueeze(-1) * (2**31 // self.num_shards) + torch.arange(columns, device=order.device)  # [S, C]
        keys = torch.where(asked.visible.unsqueeze(2), (order << 32) | (0x7FFFFFFF - place).unsqueeze(1), NOTHING)
        return keys.transpose(1, 2).flatten(2)

    def _asked(self, store: LayerStore, query: Query, q: Tensor, stored: Stored, positions: Tensor) -> PageQuery:
        """The tables of R rows, once per query."""
        num_rows, num_queries, num_q_heads, dim = q.shape
        num_shards, page_size = store.block_table.shape[1], self.page_size
        per_query = lambda x: x.view(num_rows, 1, num_shards, *x.shape[1:]).expand(-1, num_queries, *[-1] * x.dim()).flatten(0, 2)  # noqa: E731
        table, lens = per_query(stored.block_table), per_query(stored.seqlens)
        positions = positions.reshape(-1).contiguous()
        shape = (num_rows * num_queries, num_shards, table.shape[-1])
        begin = torch.arange(table.shape[-1], device=q.device, dtype=torch.int32) * page_size
        lens_of = lens.view(*shape[:2], 1)
        visible = begin < lens_of
        page = torch.where(visible, table.view(shape), 0)
        final = (lens_of - begin - 1).clamp(0, page_size - 1)
        at = store.positions if store.num_pages else torch.zeros(1, page_size, dtype=torch.int32, device=q.device)
        first, last = at[page, 0], at[page, final]
        window = self.layers[query.layer].window
        if window is not None:
            visible = visible & (last > positions.view(-1, 1, 1) - window)
        return PageQuery(
            layer=query.layer, q=q.reshape(-1, num_q_heads, dim).contiguous(), positions=positions, store=store, block_table=table,
            seqlens=lens, tail=stored.tail, tail_rows=None if stored.tail is None else per_query(stored.tail_rows), visible=visible,
            first=first, last=last, shard_begin=self.tables.shard_begin, scale=query.scale, total=self._total,
        )  # fmt: skip

    def _total(self, lse: Tensor) -> Tensor:
        if self.exchange.size == 1:
            return lse
        return self.exchange.all_gather(lse.contiguous(), "adding up attention over all ranks").logsumexp(0)

    def _budget(self, layer: int, plan: StepPlan) -> Budget:
        """Once per forward and window, from sizes that every rank knows on the host."""
        if plan is not self._plan:
            self._plan, self._budgets = plan, {}
        spec = self.layers[layer]
        if spec.window not in self._budgets:
            config, page, num_shards = self.config, self.page_size, self.num_shards
            seen = [spec.tokens_kept(n) for n in self._lens_seen(plan)]
            pages = [config.budget_pages or ceil(config.budget_ratio * n / page) for n in seen]
            # Sinks and recent tokens may lie in all shards, and end inside a page in each.
            pinned = min(config.sink_tokens, config.sink_tokens // page + num_shards)
            pinned += min(config.recent_tokens, config.recent_tokens // page + 2 * num_shards)
            width = min(max(*pages, pinned), max(seen) // page + 2 * num_shards)
            self._budgets[spec.window] = Budget(torch.tensor(pages).to(self.device), width)
        return self._budgets[spec.window]

    def _lens_seen(self, plan: StepPlan) -> list[int]:
        """Stored tokens that the queries of each row see: with one column and no staging their own too."""
        seen = list(plan.lens_before_host)
        for source in plan.sources:
            if source.num_columns == 1 and not self.stages:
                rows = slice(source.row0, source.row0 + source.num_rows)
                seen[rows] = plan.lens_after_host[rows]
        return seen

    def _count(self, asked: PageQuery, page_list: Tensor) -> None:
        real, page_size = (asked.positions >= 0).to(torch.float64), self.page_size
        lens, shape = asked.seqlens.unsqueeze(-1), asked.visible.shape  # [N, 1, 1]
        read = torch.where(page_list >= 0, (lens - page_list * page_size).clamp_max(page_size), 0).sum(-1, dtype=torch.float64).mean(1)
        begin = torch.arange(shape[-1], device=lens.device) * page_size
        stored = torch.where(asked.visible, (lens.view(*shape[:2], 1) - begin).clamp_max(page_size), 0).sum((1, 2), dtype=torch.float64)
        self.entries[0] += read.view(shape[:2]).sum(1) @ real
        self.entries[1] += stored @ real

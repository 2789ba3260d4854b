"""Eviction: pages leave until every request is within its budget. Host phase; the same decisions on every rank.

L full-attention layers, R request rows, S local and G * S global shards, C columns of a block table, H tables of a row and shard: the KV
heads with budgets per head, else 1. Layers with a sliding window are not evicted from: they keep what their window shows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds.config.scheduling import SchedulingConfig
from pikv_ds.exchange.exchange import Exchange
from pikv_ds.pages.layers import Tables
from pikv_ds.pages.listing import JoinedPages, Pages, fit
from pikv_ds.pages.pool import LayerStore
from pikv_ds.pages.recycle import drop
from pikv_ds.policies.base import RetentionPolicy
from pikv_ds.step.step import StepPlan

from .attention import Mass
from .budgets import Budgets
from .choose import Candidates, choose, protect


class Retention:
    """Applies the "scheduling" block to the tables. Owns when and how much is evicted; borrows tables and exchange."""

    def __init__(self, config: SchedulingConfig, policy: RetentionPolicy, budgets: Budgets, tables: Tables, exchange: Exchange) -> None:
        self.config, self.policy, self.budgets, self.tables, self.exchange = config, policy, budgets, tables, exchange
        self.layers = [i for i, spec in enumerate(tables.layers) if spec.window is None]
        self.mass = Mass(policy, tables)
        self.threshold = {layer: tables.rows.tensor(f"threshold.{layer}") for layer in self.layers}  # theta [R] of an adaptive policy
        self.last_eviction: list[int] = []  # per source: query columns before it
        self.steps = 0  # decode steps since an eviction was due
        self.due = False  # an eviction waits for the next forward: a crop is announced, or the prompt is kept whole

    def watches(self, layer: int) -> bool:
        """Whether the policy wants to see what the queries of this layer attend to."""
        return self.policy.watches and self.tables.layers[layer].window is None

    def reset(self) -> None:
        """A new generation begins."""
        self.steps, self.due, self.last_eviction = 0, False, []
        self.mass.reset()

    def before_forward(self, plan: StepPlan) -> None:
        """Evict what could not go after the last forward. A prompt that is kept whole waits for the first decode step."""
        self.mass.follow(plan)
        self.last_eviction = self.last_eviction or [0] * len(plan.sources)
        if self.due and (plan.decode or self.config.prefill == "evict"):
            if self.evict(plan.lens_before_host):
                self.tables.shrink()

    def after_forward(self, plan: StepPlan, lens: list[int], hold: bool) -> bool:
        """Evict what this forward made too much. hold: a crop may still take back its tokens. Returns whether pages left."""
        self.steps = self.steps + 1 if plan.decode else 0
        self.mass.advance(plan)
        if plan.decode and self.steps % self.config.interval:
            return False
        self.due = True
        return not hold and (plan.decode or self.config.prefill == "evict") and self.evict(lens)

    def evict(self, lens: list[int]) -> bool:
        """Free pages of all rows that are over their budget. Collectives: one when there are several ranks and some row is over.

        Returns whether some were; the same on every rank.
        """
        self.due = False
        excess = self._excess(lens)
        over = [i for i, rows in enumerate(excess) if any(n > 0 for n in rows)]
        if not over:
            return False
        num_pages = torch.tensor([[-(-max(n, 0) // self.tables.page_size) for n in excess[i]] for i in over]).to(self.tables.device)
        pages = self._gather([self._candidates(self.layers[i], lens) for i in over], lens)
        for i, gone in zip(over, self._choose(over, pages, num_pages, lens), strict=True):
            layer = self.layers[i]
            for pool, own in self._by_pool(layer, lens, self.tables.map.own(gone, 1, self.tables.heads)):
                self.tables.counters.evicted += drop(pool, own)
            self.tables.directory.evict(layer, gone.sum(-1) * self.tables.page_size)
        self.tables.note_eviction(lens)
        self._note_time(over, excess)
        return True

    def _note_time(self, over: list[int], excess: list[list[int]]) -> None:
        """Sources that had a row over its budget have lost entries now."""
        begin, each = 0, len(excess[0]) // sum(self.mass.num_rows)  # with "uniform" heads a number per head
        for i, rows in enumerate(self.mass.num_rows):
            end = begin + rows * each
            if any(n > 0 for layer in over for n in excess[layer][begin:end]):
                self.last_eviction[i] = self.mass.times[i]
            begin = end

    def _excess(self, lens: list[int]) -> list[list[int]]:
        """[L][R] entries above the budget, known on the host without the device; with "uniform" heads [L][R * H], each of its own."""
        budgets, joint = [self.budgets.of(n) for n in lens], self.config.head_budget == "adaptive"
        excess = []
        for i, layer in enumerate(self.layers):
            over = [[n - budgets[row][i] - gone for gone in self.tables.evicted[layer][row]] for row, n in enumerate(lens)]
            excess.append([sum(heads) for heads in over] if joint else [n for heads in over for n in heads])
        return excess

    def pages(self, layer: int, lens: list[int]) -> Pages:
        """The pages of a layer as the policy sees them. lens: tokens of every row."""
        heads = self.tables.heads
        lens = torch.tensor(lens, dtype=torch.int64).to(self.tables.device).repeat_interleave(heads)
        pools = [
            Pages(
                store=store,
                table=_by_head(store.block_table, heads).contiguous(),
                counts=_by_head(store.counts, heads),
                lens=lens,
                rows=self.mass.rows_by_head(layer, heads),
                time=self.mass.by_row(self.mass.times),
                last_eviction=self.mass.by_row(self.last_eviction),
                layer=layer,
                tail_rows=None
                if store.full_pages
                else _by_head(torch.arange(store.counts.numel(), device=store.device).view_as(store.counts), heads),
            )
            for store in self.tables.pools(layer)
        ]
        return pools[0] if self.tables.far[layer] is None else JoinedPages.of(pools, self.tables.far_maps[layer])

    def _by_pool(self, layer: int, lens: list[int], gone: Tensor) -> list[tuple[LayerStore, Tensor]]:
        """gone [R, S * H, C] bool of the pages that `pages` shows -> the layer's stores, and which of each."""
        store = self.tables.stores[layer]
        if self.tables.far[layer] is None:
            return [(store, fit(gone, store.block_table.shape[-1], False))]
        return self.pages(layer, lens).by_pool(gone)

    def _candidates(self, layer: int, lens: list[int]) -> Candidates:
        """Of this rank's tables, [R, S * H, C] each."""
        pages = self.pages(layer, lens)
        recent = (pages.lens - self.config.recent_tokens)[:, None, None]
        first = pages.slot_positions[..., 0]
        free = (pages.entries == self.tables.page_size) & (first >= self.config.sink_tokens) & (pages.last_position < recent)
        adapts = self.policy.target_hit_rate is not None
        hit = self.policy.hits(pages) if adapts else torch.zeros_like(free)
        score = torch.where(free, self.policy.score(pages), torch.inf)
        heads = self.tables.heads
        return Candidates(*(_by_table(x, heads) for x in (score, pages.last_position, hit & free)))

    def _gather(self, own: list[Candidates], lens: list[int]) -> Candidates:
        """The candidates of all shards in shard order, [L, R, S * H, C]: the same tensors on every rank, whatever their number."""
        most = max(n - min(min(self.tables.evicted[layer][row]) for layer in self.layers) for row, n in enumerate(lens))
        columns = -(-most // self.tables.page_size) if self.exchange.size > 1 else max(c.score.shape[-1] for c in own)
        score = torch.stack([fit(c.score, columns, torch.inf) for c in own])
        last = torch.stack([fit(c.last_position, columns, -1) for c in own])
        hit = torch.stack([fit(c.hit, columns, False) for c in own])
        if self.exchange.size == 1:
            return Candidates(score, last, hit)
        block = torch.stack([score.view(torch.int32), last, hit.to(torch.int32)])
        gathered = self.exchange.all_gather(block, "gathering the scores of pages")  # [G, 3, L, R, S, C]
        score, last, hit = self.tables.map.in_shard_order(gathered.permute(1, 2, 3, 0, 4, 5).flatten(3, 4), 3, self.tables.heads)
        return Candidates(score.contiguous().view(torch.float32), last, hit > 0)

    def _choose(self, over: list[int], pages: Candidates, num_pages: Tensor, lens: list[int]) -> Tensor:
        """[L, R, S * H, C] bool: what leaves of the layers `over`. num_pages as in _excess."""
        heads, sum_layers = self.tables.heads, self.policy.sums_layers
        if self.config.head_budget == "uniform":  # every head of a request is a row of its own
            by_head = Candidates(*(_by_head(x.flatten(0, 1), heads).unflatten(0, (len(over), -1)) for x in pages))
            gone = choose(by_head, num_pages, sum_layers=sum_layers)
            return _by_table(gone.flatten(0, 1), heads).view_as(pages.score)
        if self.config.head_budget == "adaptive":
            floor = [int(self.config.head_floor * self.budgets.of(n)[i]) for i in over for n in lens]
            safe = [max(1, entries // self.tables.page_size) if entries else 0 for entries in floor]
            best = protect(*(_by_head(x.flatten(0, 1), heads) for x in pages[:2]), torch.tensor(safe).repeat_interleave(heads))
            pages = pages._replace(score=_by_table(best, heads).view_as(pages.score))
        return choose(pages, num_pages, self._thresholds(over, pages, num_pages), sum_layers=sum_layers)

    def _thresholds(self, over: list[int], pages: Candidates, num_pages: Tensor) -> Tensor | None:
        """theta [L, R] of an adaptive policy for rows that are over their budget, -inf for the others; None = the policy has none."""
        policy = self.policy
        if policy.target_hit_rate is None:
            return None
        candidates = (pages.score < torch.inf).sum((-1, -2)).clamp_min(1)
        step = policy.threshold_rate * (policy.target_hit_rate - pages.hit.sum((-1, -2)) / candidates)
        for i, change, due in zip(over, step, num_pages > 0, strict=True):
            theta = self.threshold[self.layers[i]]
            theta.value = torch.where(due, theta.value + change, theta.value)
        theta = torch.stack([self.threshold[self.layers[i]].value for i in over])
        return torch.where(num_pages > 0, theta, -torch.inf)


def _by_head(x: Tensor, heads: int) -> Tensor:
    """[R, S * H, ...] of tables -> [R * H, S, ...]: every head of a row as a row."""
    return x if heads == 1 else x.unflatten(1, (-1, heads)).transpose(1, 2).flatten(0, 1)


def _by_table(x: Tensor, heads: int) -> Tensor:
    """[R * H, S, ...] -> [R, S * H, ...]."""
    return x if heads == 1 else x.unflatten(0, (-1, heads)).transpose(1, 2).flatten(1, 2)

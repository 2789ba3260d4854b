"""Eviction: pages leave until every request is within its budget. Host phase, between forwards; the same decisions on every rank.

L full-attention layers, R request rows, S local and G * S global shards, C columns of a block table. Layers with a sliding window are not
evicted from: they keep what their window shows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .budgets import Budgets
from .choice import Candidates, choose, fit, protect
from .config import PiKVConfig
from .exchange import Exchange
from .mass import Mass
from .plan import StepPlan
from .policies.base import Pages, RetentionPolicy
from .recycle import drop
from .tables import Tables


class Retention:
    """Applies the "scheduling" block to the tables. Owns when and how much is evicted; borrows tables and exchange."""

    def __init__(self, config: PiKVConfig, policy: RetentionPolicy, tables: Tables, exchange: Exchange) -> None:
        self.policy, self.tables, self.exchange = policy, tables, exchange
        self.config = config = config.scheduling
        self.layers = [i for i, spec in enumerate(tables.layers) if spec.window is None]
        tables.page_values = policy.page_values
        entry_bytes = sum(
            tables.formats[i].record_bytes + sum(dtype.itemsize for dtype in policy.page_values.values()) for i in self.layers
        )
        self.budgets = Budgets(config, len(self.layers), tables.page_size, tables.num_shards, entry_bytes / tables.page_size)
        self.mass = Mass(policy, tables)
        self.threshold: dict[int, Tensor] = {}  # layer -> theta [R] f32 of an adaptive policy
        self.last_eviction: list[int] = []  # per source: query columns before it
        self.steps = 0  # decode steps since an eviction was due
        self.due = False  # an eviction waits for the next forward: a crop is announced, or the prompt is kept whole

    def watches(self, layer: int) -> bool:
        """Whether the policy wants to see what the queries of this layer attend to."""
        return self.policy.watches and self.tables.layers[layer].window is None

    def reset(self) -> None:
        """A new generation begins."""
        self.steps, self.due, self.last_eviction = 0, False, []
        self.threshold = {}
        self.mass.reset()

    def remap(self, parent: list[int]) -> None:
        """Row i continues row parent[i], -1 = a new row."""
        index = torch.tensor(parent, dtype=torch.int64).to(self.tables.device)
        self.mass.remap(index)
        self.threshold = {layer: torch.where(index >= 0, x[index.clamp_min(0)], 0) for layer, x in self.threshold.items()}

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
        page_size, heads, local = self.tables.page_size, self.tables.heads, self.tables.local
        num_pages = torch.tensor([[-(-max(n, 0) // page_size) for n in excess[i]] for i in over]).to(self.tables.device)
        if self.config.head_budget == "uniform":
            num_pages = num_pages.repeat_interleave(heads, 1)
        pages = self._gather([self._candidates(self.layers[i], lens) for i in over], lens)
        gone = choose(pages, num_pages, self._thresholds(over, pages, num_pages), sum_layers=self.policy.sums_layers)
        for i, choice in zip(over, gone, strict=True):
            layer = self.layers[i]
            store = self.tables.stores[layer]
            own = choice[:, local] if heads == 1 else choice.view(len(lens), heads, -1)
            self.tables.counters.evicted += drop(store, fit(own, store.block_table.shape[-1], False))
            entries = choice.sum(-1) if heads == 1 else own.sum((1, 2)).unsqueeze(-1)
            self.tables.directory.evict(layer, entries * page_size)
        self.tables.note_eviction(lens)
        self._note_time(over, excess)
        return True

    def _note_time(self, over: list[int], excess: list[list[int]]) -> None:
        row0 = 0
        for i, rows in enumerate(self.mass.num_rows):
            if any(n > 0 for layer in over for n in excess[layer][row0 : row0 + rows]):
                self.last_eviction[i] = self.mass.times[i]
            row0 += rows

    def _excess(self, lens: list[int]) -> list[list[int]]:
        """[L][R] entries above the budget (of all heads together when these share it), known on the host without the device."""
        budgets, evicted, heads = [self.budgets.of(n) for n in lens], self.tables.evicted, self.tables.heads
        joint = heads if self.config.head_budget == "adaptive" else 1
        return [
            [(n - budgets[row][i]) * joint - evicted[layer][row] * joint // heads for row, n in enumerate(lens)]
            for i, layer in enumerate(self.layers)
        ]

    def pages(self, layer: int, lens: list[int]) -> Pages:
        """A layer as its policy sees it. lens: tokens of every row."""
        store, heads = self.tables.stores[layer], self.tables.heads
        lens = torch.tensor(lens, dtype=torch.int64).to(store.device).repeat_interleave(heads)
        return Pages(
            store=store,
            table=store.block_table.view(len(lens), -1, store.block_table.shape[-1]),
            counts=store.counts.view(len(lens), -1),
            lens=lens,
            rows=self.mass.rows_by_head(layer, heads),
            time=self.mass.by_row(self.mass.times),
            last_eviction=self.mass.by_row(self.last_eviction),
        )

    def _candidates(self, layer: int, lens: list[int]) -> Candidates:
        pages = self.pages(layer, lens)
        recent = (pages.lens - self.config.recent_tokens)[:, None, None]
        first = pages.slot_positions[..., 0]
        free = (pages.entries == self.tables.page_size) & (first >= self.config.sink_tokens) & (pages.last_position < recent)
        adapts = self.policy.target_hit_rate is not None
        hit = self.policy.hits(pages) if adapts else torch.zeros_like(free)
        score = torch.where(free, self.policy.score(pages), torch.inf)
        if self.config.head_budget != "adaptive":
            return Candidates(score, pages.last_position, hit & free)
        score, last, hit, present = (
            x.view(len(lens), self.tables.heads, -1) for x in (score, pages.last_position, hit & free, pages.entries > 0)
        )
        floor = [self.config.head_floor * self.budgets.of(n)[self.layers.index(layer)] for n in lens]
        safe = [max(1, int(entries) // self.tables.page_size) if entries else 0 for entries in floor]
        return Candidates(protect(score, present, torch.tensor(safe, device=score.device)), last, hit)

    def _gather(self, own: list[Candidates], lens: list[int]) -> Candidates:
        """The candidates of all shards in shard order: the same tensors on every rank, whatever their number."""
        most = max(n - min(self.tables.evicted[layer][row] for layer in self.layers) for row, n in enumerate(lens))
        columns = -(-most // self.tables.page_size) if self.exchange.size > 1 else max(c.score.shape[-1] for c in own)
        score = torch.stack([fit(c.score, columns, torch.inf) for c in own])
        last = torch.stack([fit(c.last_position, columns, -1) for c in own])
        hit = torch.stack([fit(c.hit, columns, False) for c in own])
        if self.exchange.size == 1:
            return Candidates(score, last, hit)
        block = torch.stack([score.view(torch.int32), last, hit.to(torch.int32)])
        gathered = self.exchange.all_gather(block, "gathering the scores of pages")  # [G, 3, L, R, S, C]
        score, last, hit = gathered.permute(1, 2, 3, 0, 4, 5).flatten(3, 4)
        return Candidates(score.contiguous().view(torch.float32), last, hit > 0)

    def _thresholds(self, over: list[int], pages: Candidates, num_pages: Tensor) -> Tensor | None:
        """theta [L, R] of an adaptive policy for rows that are over their budget, -inf for the others; None = the policy has none."""
        policy = self.policy
        if policy.target_hit_rate is None:
            return None
        candidates = (pages.score < torch.inf).sum((-1, -2)).clamp_min(1)
        step = policy.threshold_rate * (policy.target_hit_rate - pages.hit.sum((-1, -2)) / candidates)
        for i, change, due in zip(over, step, num_pages > 0, strict=True):
            old = self.threshold.get(self.layers[i], torch.zeros_like(change))
            self.threshold[self.layers[i]] = torch.where(due, old + change, old)
        theta = torch.stack([self.threshold[self.layers[i]] for i in over])
        return torch.where(num_pages > 0, theta, -torch.inf)

"""Eviction: pages leave until every request is within its budget. Host phase, between forwards; the same decisions on every rank.

L full-attention layers, R request rows, S local and G * S global shards, C columns of a block table. Layers with a sliding window are not
evicted from: they keep what their window shows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .budgets import Budgets
from .choice import Candidates, choose, fit
from .config import PiKVConfig
from .errors import ConfigError
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
        self._refuse(config)
        self.config = config = config.scheduling
        self.layers = [i for i, spec in enumerate(tables.layers) if spec.window is None]
        if not self.layers:
            raise ConfigError(
                f"pikv.scheduling.method = {config.method!r} on a model whose layers all have a sliding window: nothing would be evicted, "
                f"windows bound the cache already; use 'none'"
            )
        tables.page_values = policy.page_values
        entry_bytes = sum(
            tables.formats[i].record_bytes + sum(dtype.itemsize for dtype in policy.page_values.values()) for i in self.layers
        )
        self.budgets = Budgets(config, len(self.layers), tables.page_size, tables.num_shards, entry_bytes / tables.page_size)
        self.mass = Mass(policy, tables)
        self.threshold: dict[int, Tensor] = {}  # layer -> theta [R] f32 of an adaptive policy
        self.last_eviction = 0  # query columns before it
        self.steps = 0  # decode steps since an eviction was due
        self.due = False  # an eviction waits for the next forward: a crop is announced, or the prompt is kept whole

    def watches(self, layer: int) -> bool:
        """Whether the policy wants to see what the queries of this layer attend to."""
        return self.policy.watches and self.tables.layers[layer].window is None

    def reset(self, mode: str) -> None:
        """A new generation begins; mode: how the ranks' requests relate (agreement.py)."""
        self.steps, self.due, self.last_eviction = 0, False, 0
        self.threshold = {}
        self.mass.reset()
        if mode == "distinct" and self.policy.watches:
            raise ConfigError(self._distinct_refused())

    def remap(self, parent: list[int]) -> None:
        """Row i continues row parent[i], -1 = a new row."""
        index = torch.tensor(parent, dtype=torch.int64).to(self.tables.device)
        self.mass.remap(index)
        self.threshold = {layer: torch.where(index >= 0, x[index.clamp_min(0)], 0) for layer, x in self.threshold.items()}

    def _refuse(self, config: PiKVConfig) -> None:
        scheduling, policy, one_shard = config.scheduling, self.policy, self.tables.num_shards == 1
        if policy.needs_one_shard and not one_shard:
            raise ConfigError(
                f"pikv.scheduling.method = {policy.name!r} with {self.tables.num_shards} shards (pikv.storage.num_shards, one per rank by "
                f"default): a score depends on all entries of a request; use one shard on one rank, or another method"
            )
        if policy.sums_layers and not (one_shard or config.storage.placement == "position"):
            raise ConfigError(
                f"pikv.scheduling.method = {policy.name!r} with pikv.storage.placement = {config.storage.placement!r} and "
                f"{self.tables.num_shards} shards: pages hold other entries in each layer, so scores can't be summed over layers; use "
                f"placement 'position', or one shard"
            )
        if policy.sums_layers and scheduling.layer_budget != "uniform":
            raise ConfigError(
                f"pikv.scheduling.layer_budget = {scheduling.layer_budget!r} with method {policy.name!r}, which keeps the same entries in "
                f"every layer: legal is 'uniform'"
            )
        if not policy.watches:
            return
        if config.routing.method != "all":
            raise ConfigError(
                f"pikv.routing.method = {config.routing.method!r} with pikv.scheduling.method = {policy.name!r}: attention to pages that "
                f"a query does not read can't be measured; use 'all', or a method that looks at positions or keys"
            )
        if config.storage.requests == "distinct" and self.exchange.size > 1:
            raise ConfigError(self._distinct_refused())
        if config.storage.expert_ids == "true":
            raise ConfigError(
                f"pikv.storage.expert_ids = 'true' with pikv.scheduling.method = {self.policy.name!r}: entries are stored after the "
                f"queries of their forward have read, so the attention they get is not known; use 'previous_layer', or a method that "
                f"looks at positions or keys"
            )

    def _distinct_refused(self) -> str:
        return (
            f"pikv.scheduling.method = {self.policy.name!r} with distinct requests (pikv.storage.requests): ranks do not learn the merged "
            f"lse of another rank's queries, so the attention that pages get can't be measured; use replicated requests, or a method "
            f"that looks at positions or keys, such as 'streaming_llm'"
        )

    def before_forward(self, plan: StepPlan) -> None:
        """Evict what could not go after the last forward. A prompt that is kept whole waits for the first decode step."""
        if self.due and (plan.decode or self.config.prefill == "evict"):
            if self.evict(plan.lens_before_host):
                self.tables.shrink()

    def after_forward(self, plan: StepPlan, lens: list[int], hold: bool) -> bool:
        """Evict what this forward made too much. hold: a crop may still take back its tokens. Returns whether pages left."""
        self.steps = self.steps + 1 if plan.decode else 0
        self.mass.time += plan.sources[plan.own].num_columns
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
        device, page_size = self.tables.device, self.tables.page_size
        num_pages = torch.tensor([[-(-max(n, 0) // page_size) for n in excess[i]] for i in over]).to(device)
        pages = self._gather([self._candidates(self.layers[i], lens) for i in over], lens)
        gone = choose(pages, num_pages, self._thresholds(over, pages, num_pages), sum_layers=self.policy.sums_layers)
        local = self.tables.local
        for i, choice in zip(over, gone, strict=True):
            layer = self.layers[i]
            store = self.tables.stores[layer]
            self.tables.counters.evicted += drop(store, fit(choice[:, local], store.block_table.shape[-1], False))
            self.tables.directory.evict(layer, choice.sum(-1) * page_size)
        self.tables.note_eviction(lens)
        self.last_eviction = self.mass.time
        return True

    def _excess(self, lens: list[int]) -> list[list[int]]:
        """[L][R] entries above the budget, known on the host without looking at the device."""
        budgets = [self.budgets.of(n) for n in lens]
        evicted = self.tables.evicted
        return [[n - evicted[layer][row] - budgets[row][i] for row, n in enumerate(lens)] for i, layer in enumerate(self.layers)]

    def pages(self, layer: int, lens: list[int]) -> Pages:
        """A layer as its policy sees it. lens: tokens of every row."""
        store = self.tables.stores[layer]
        return Pages(
            store=store,
            lens=torch.tensor(lens, dtype=torch.int64).to(store.device),
            rows=self.mass.rows.get(layer, {}),
            time=self.mass.time,
            last_eviction=self.last_eviction,
        )

    def _candidates(self, layer: int, lens: list[int]) -> Candidates:
        pages = self.pages(layer, lens)
        recent = (pages.lens - self.config.recent_tokens)[:, None, None]
        first = pages.slot_positions[..., 0]
        free = (pages.entries == self.tables.page_size) & (first >= self.config.sink_tokens) & (pages.last_position < recent)
        adapts = self.policy.target_hit_rate is not None
        hit = self.policy.hits(pages) if adapts else torch.zeros_like(free)
        return Candidates(torch.where(free, self.policy.score(pages), torch.inf), pages.last_position, hit & free)

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

"""Eviction: pages leave until every request is within its budget. Host phase; the same decisions on every rank.

L full-attention layers, R request rows, S local and G * S global shards, C columns of a block table, H tables of a row and shard: the KV
heads with budgets per head, else 1. Layers with a sliding window are not evicted from: they keep what their window shows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pikv_ds.config.scheduling import SchedulingConfig
from pikv_ds.exchange.exchange import Exchange
from pikv_ds.pages.layers import RankPages
from pikv_ds.pages.listing import JoinedPages, Pages, fit
from pikv_ds.pages.recycle import drop
from pikv_ds.pages.table import by_head, by_table
from pikv_ds.policies.base import RetentionPolicy
from pikv_ds.staging import sent
from pikv_ds.step.step import Step

from .attention import Shares
from .budgets import Budgets
from .choose import Candidates, choose, protect
from .gathered import of_all_shards


class Retention:
    """Applies the "scheduling" block to the tables. Owns when and how much is evicted; borrows tables and exchange."""

    def __init__(
        self,
        config: SchedulingConfig,
        policy: RetentionPolicy,
        budgets: Budgets,
        pages: RankPages,
        exchange: Exchange,
        attended: RetentionPolicy | None,
    ) -> None:
        """attended: another policy to be shown attention, as it says which pages stay near (tiers/window.py); None = there is none."""
        self.config, self.policy, self.budgets, self.pages, self.exchange = config, policy, budgets, pages, exchange
        self.layers = [i for i, spec in enumerate(pages.specs) if spec.window is None]
        counts_it = attended is None or isinstance(policy, type(attended))
        who = f"pikv.scheduling.method = {policy.name!r}"
        self.shares = Shares([policy] if counts_it else [policy, attended], pages, who)
        self.threshold = {
            layer: pages.rows.tensor(f"threshold.{layer}", empties=True) for layer in self.layers
        }  # theta [R] of an adaptive policy
        self.steps = 0  # decode steps since an eviction was due
        self.due = False  # an eviction waits for the next forward: a crop is announced, or the prompt is kept whole

    def start(self) -> None:
        """A new generation begins."""
        self.steps, self.due = 0, False

    def before_forward(self, step: Step) -> None:
        """Evict what could not go after the last forward. A prompt that is kept whole waits for the first decode step, or for its end where
        that is known; and a row some of whose tokens may still be taken back until it is known which stay."""
        if self.due and (step.decode or self.config.prefill != "keep"):
            waits = step.unsettled
            if step.prompt and self.config.prefill == "auto":
                within = step.within_prompt(step.lens_before_host)
                waits = [a or b for a, b in zip(within, waits or within, strict=True)]
            if self.evict(step.lens_before_host, waits):
                self.pages.room.shrink()
            self.due = any(waits)

    def after_forward(self, step: Step) -> bool:
        """Evict what this forward made too much, unless a crop may still take back its tokens. Returns whether pages left."""
        self.steps = self.steps + 1 if step.decode else 0
        if step.decode and self.steps % self.config.interval:
            return False
        self.due = True
        if step.hold or not (step.decode or self.config.prefill != "keep"):
            return False
        waits = step.within_prompt(step.lens_after_host) if self.config.prefill == "auto" else ()
        return self.evict(step.lens_after_host, waits)

    def evict(self, lens: list[int], waits: Sequence[bool] = ()) -> bool:
        """Free pages of all rows that are over their budget, but of those that wait. Collectives: one when there are several ranks and some
        row is over.

        Returns whether some were; the same on every rank.
        """
        self.due = False
        excess = self._excess(lens, waits or [False] * len(lens))
        over = [i for i, rows in enumerate(excess) if any(n > 0 for n in rows)]
        if not over:
            return False
        num_pages = sent([[-(-max(n, 0) // self.pages.page_size) for n in excess[i]] for i in over], torch.int64, self.pages.device)
        judged = [self.judged(self.layers[i], lens) for i in over]
        candidates = self._gather([self._candidates(pages) for pages in judged], lens)
        for pages, gone in zip(judged, self._choose(over, candidates, num_pages, lens), strict=True):
            for pool, own in pages.by_pool(self.pages.map.own(gone, 1, self.pages.heads)):
                self.pages.counters.evict(drop(pool, own))
            self.pages.directory.evict(pages.layer, gone.sum(-1) * self.pages.page_size)
            for tell in self.pages.layers[pages.layer].events.dropped:
                tell(pages.layer, gone)
        self.pages.note_eviction(lens)
        return True

    def _excess(self, lens: list[int], waits: Sequence[bool]) -> list[list[int]]:
        """[L][R] entries above the budget, known on the host without the device; with "uniform" heads [L][R * H], each of its own."""
        budgets, joint = [self.budgets.of(n) for n in lens], self.config.head_budget == "adaptive"
        excess = []
        for i, layer in enumerate(self.layers):
            over = [
                [0 if waits[row] else n - budgets[row][i] - gone for gone in self.pages.evicted[layer][row]] for row, n in enumerate(lens)
            ]
            excess.append([sum(heads) for heads in over] if joint else [n for heads in over for n in heads])
        return excess

    def judged(self, layer: int, lens: list[int]) -> Pages:
        """The pages of a layer as the policy sees them. lens: tokens of every row."""
        heads = self.pages.heads
        each = lambda numbers: sent(numbers, torch.int64, self.pages.device).repeat_interleave(heads)  # noqa: E731
        lens, last_eviction = each(lens), each(self.pages.crops.evicted_at.values).view(-1, 1, 1)
        parts = [
            Pages(
                pool=pool,
                table=by_head(pool.table.ids, heads).contiguous(),
                counts=by_head(pool.table.counts, heads),
                lens=lens,
                rows=self.shares.rows_by_head(layer, heads),
                last_eviction=last_eviction,
                layer=layer,
                tail_rows=None
                if pool.full_pages
                else by_head(torch.arange(pool.table.counts.numel(), device=pool.device).view_as(pool.table.counts), heads),
            )
            for pool in self.pages.layers[layer].pools
        ]
        return parts[0] if len(parts) == 1 else JoinedPages.of(parts)

    def _candidates(self, pages: Pages) -> Candidates:
        """Of this rank's tables, [R, S * H, C] each."""
        recent = (pages.lens - self.config.recent_tokens)[:, None, None]
        first = pages.slot_positions[..., 0]
        free = (pages.entries == self.pages.page_size) & (first >= self.config.sink_tokens) & (pages.last_position < recent)
        adapts = self.policy.target_hit_rate is not None
        hit = self.policy.hits(pages) if adapts else torch.zeros_like(free)
        score = torch.where(free, self.policy.score(pages), torch.inf)
        heads = self.pages.heads
        return Candidates(*(by_table(x, heads) for x in (score, pages.last_position, hit & free)))

    def _gather(self, own: list[Candidates], lens: list[int]) -> Candidates:
        """The candidates of all shards in shard order, [L, R, S * H, C]: the same tensors on every rank, whatever their number."""
        most = max(n - min(min(self.pages.evicted[layer][row]) for layer in self.layers) for row, n in enumerate(lens))
        columns = -(-most // self.pages.page_size) if self.exchange.size > 1 else max(c.score.shape[-1] for c in own)
        score = torch.stack([fit(c.score, columns, torch.inf) for c in own])
        last = torch.stack([fit(c.last_position, columns, -1) for c in own])
        hit = torch.stack([fit(c.hit, columns, False) for c in own])
        others = last, hit.to(torch.int32)
        score, last, hit = of_all_shards(score, others, self.exchange, self.pages.map, self.pages.heads, "gathering the scores of pages")
        return Candidates(score, last, hit > 0)

    def _choose(self, over: list[int], pages: Candidates, num_pages: Tensor, lens: list[int]) -> Tensor:
        """[L, R, S * H, C] bool: what leaves of the layers `over`. num_pages as in _excess."""
        heads, sum_layers = self.pages.heads, self.policy.sums_layers
        if self.config.head_budget == "uniform":  # every head of a request is a row of its own
            heads_apart = Candidates(*(by_head(x.flatten(0, 1), heads).unflatten(0, (len(over), -1)) for x in pages))
            gone = choose(heads_apart, num_pages, sum_layers=sum_layers)
            return by_table(gone.flatten(0, 1), heads).view_as(pages.score)
        if self.config.head_budget == "adaptive":
            floor = [int(self.config.head_floor * self.budgets.of(n)[i]) for i in over for n in lens]
            safe = [max(1, entries // self.pages.page_size) if entries else 0 for entries in floor]
            best = protect(*(by_head(x.flatten(0, 1), heads) for x in pages[:2]), torch.tensor(safe).repeat_interleave(heads))
            pages = pages._replace(score=by_table(best, heads).view_as(pages.score))
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

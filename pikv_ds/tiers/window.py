"""Two pools of pages in a layer: `near` in a light format, where entries are appended, and `far` in the codec's. Host phase.

After a forward, full near pages that hold no sink token and nothing of the recent window are demoted: encoded into far pages and freed
(pages/move.py). Both are read and merged by lse. With a light_ratio only the least important of them go. Layers with a sliding window have
one pool, in the codec's format.

L layers with two pools, R request rows, S local and G * S global shards, C columns of a block table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds.blueprint.blueprint import Blueprint
from pikv_ds.exchange.exchange import Exchange
from pikv_ds.pages.layers import Tables
from pikv_ds.pages.listing import Pages, fit
from pikv_ds.pages.move import Moved, demote
from pikv_ds.pages.pool import LayerStore
from pikv_ds.pages.rows import RowChange, forgets, least
from pikv_ds.pages.sizing import light_pages
from pikv_ds.policies.h2o import HeavyHitters
from pikv_ds.retention.attention import Mass
from pikv_ds.retention.choose import Candidates, choose
from pikv_ds.step.step import StepPlan


class Tiers:
    """Decides when and which pages are demoted. Owns what crops may still take back; borrows tables and exchange."""

    def __init__(self, blueprint: Blueprint, tables: Tables, exchange: Exchange, watching: Mass | None) -> None:
        """watching: what a retention policy is shown already, for the attention to pages to be counted on."""
        self.tables, self.exchange = tables, exchange
        block, codec = blueprint.config.compression, blueprint.codec
        self.sinks, self.recent = block.raw_sink_tokens or 0, block.raw_recent_tokens or 0
        self.light_ratio = None if codec.light is None else codec.light_ratio
        self.layers = [i for i, far in enumerate(tables.far_formats) if far is not None]
        self.attended = blueprint.attended  # whose score says which pages stay near under a light_ratio
        self.mass: Mass | None = None  # None: pages go by their age alone, or attention is counted on `watching`
        if self.light_ratio is not None:
            if watching is None:
                self.mass = Mass(self.attended, tables)
            elif not any(isinstance(policy, HeavyHitters) for policy in watching.policies):  # these count it already
                watching.policies.append(self.attended)
        rows = tables.rows
        self.floor = rows.ints("window.floor")  # positions of a row that may have been demoted lie below it; the same on every rank
        self.due = rows.ints("window.due", forgets)  # tokens of a row at which a page can become old enough; of this rank's shards
        self.seen = rows.ints("window.seen", least)  # tokens of a row when pages were last compared; the same on every rank
        rows.limit(self.check)

    def reset(self) -> None:
        """A new generation begins."""
        if self.mass is not None:
            self.mass.reset()

    def check(self, change: RowChange) -> None:
        """Raises: RuntimeError for a crop that may reach a demoted entry, on all ranks alike."""
        for parent, keep in zip(change.parent, change.keep, strict=True):
            floor = self.floor.values[parent] if parent >= 0 else 0
            if keep < floor:
                raise RuntimeError(
                    f"crop to {keep} of {change.lens[parent]} tokens: entries up to token {floor} may have been encoded "
                    f"(pikv.compression.raw_recent_tokens = {self.recent}) and pages of them can't be cut; announce crops before the "
                    f"forward that they undo (cache.activate_past_recording(), as assisted generation does)"
                )

    def near_span(self, seen: list[int]) -> int:
        """Most positions of a row of these lengths that near pages can hold, sinks not counted; the same on every rank."""
        light = 0 if self.light_ratio is None else max(int(self.light_ratio * n) for n in seen) + self.tables.page_size
        return max(n - floor for n, floor in zip(seen, self.floor.values, strict=True)) + light

    def after_forward(self, plan: StepPlan, lens: list[int], hold: bool) -> list[tuple[int, Moved]]:
        """Demote what has become old. hold: a crop may still take back tokens, so nothing goes. Returns what moved, by layer.

        Collectives: none; with a light_ratio and several ranks one, when a row has a page of new tokens.
        """
        if hold or not lens:
            return []
        size = self.tables.page_size
        old = [n - self.recent if n - self.recent >= size else 0 for n in lens]
        self.floor.values = [max(floor, n) for floor, n in zip(self.floor.values, old, strict=True)]
        if self.light_ratio is None:
            if all(n < due for n, due in zip(lens, self.due.values, strict=True)):
                return []
            gone = [self._old(self.tables.stores[layer], lens) for layer in self.layers]
        else:
            if plan.decode and all(n - seen < size for n, seen in zip(lens, self.seen.values, strict=True)):
                return []
            self.seen.values = list(lens)
            gone = self._least_important(lens)
        moved = [
            (layer, demote(*self.tables.pools(layer), which, self.tables.far_maps[layer]))
            for layer, which in zip(self.layers, gone, strict=True)
        ]
        if self.light_ratio is None:
            self.due.values = self._next_due(lens)
        return [(layer, pages) for layer, pages in moved if pages is not None]

    def _pages(self, store: LayerStore, lens: list[int]) -> Pages:
        lens = torch.tensor(lens, dtype=torch.int64).to(store.device)
        return Pages(store=store, table=store.block_table, counts=store.counts, lens=lens)

    def _complete(self, pages: Pages) -> Tensor:
        """[R, S, C] bool: full, and no sink in it."""
        return (pages.entries == self.tables.page_size) & (pages.slot_positions[..., 0] >= self.sinks)

    def _old(self, store: LayerStore, lens: list[int]) -> Tensor:
        """[R, S, C] bool: the pages that neither sinks nor the recent window keep near."""
        if store.num_pages == 0:
            return torch.zeros_like(store.block_table, dtype=torch.bool)
        pages = self._pages(store, lens)
        return self._complete(pages) & (pages.last_position < (pages.lens - self.recent)[:, None, None])

    def _next_due(self, lens: list[int]) -> list[int]:
        """Per row, the fewest tokens at which a page of this rank can be old, full now or when its open page has filled up."""
        size, soonest = self.tables.page_size, []
        for layer in self.layers:
            store = self.tables.stores[layer]
            fills = (size - store.counts % size).amin(-1) + torch.tensor(lens, device=store.device)  # [R]
            if store.num_pages:
                pages = self._pages(store, lens)
                last = torch.where(self._complete(pages), pages.last_position + 1, torch.iinfo(torch.int32).max // 2)
                fills = torch.minimum(fills, last.flatten(1).amin(-1)) if last.shape[-1] else fills
            soonest.append(fills + self.recent)
        return torch.stack(soonest).amin(0).tolist()

    def _least_important(self, lens: list[int]) -> list[Tensor]:
        """[L] of [R, S, C] bool: of the old pages of all shards the least attended, so many that the others hold light_ratio at most."""
        stores = [self.tables.stores[layer] for layer in self.layers]
        columns = -(-max(lens) // self.tables.page_size) + 1
        score, last = [], []
        for store in stores:
            old, pages = self._old(store, lens), self._pages(store, lens)
            value = self.attended.score(pages) if store.num_pages else torch.zeros_like(old, dtype=torch.float32)
            score.append(fit(torch.where(old, value, torch.inf), columns, torch.inf))
            last.append(fit(pages.last_position if store.num_pages else torch.full_like(old, -1, dtype=torch.int32), columns, -1))
        score, last = torch.stack(score), torch.stack(last)
        if self.exchange.size > 1:
            block = torch.stack([score.view(torch.int32), last])
            gathered = self.exchange.all_gather(block, "gathering the attention to pages")  # [G, 2, L, R, S, C]
            score, last = self.tables.map.in_shard_order(gathered.permute(1, 2, 3, 0, 4, 5).flatten(3, 4), 3)
            score = score.contiguous().view(torch.float32)
        allowed = torch.tensor([light_pages(self.light_ratio, n, self.tables.page_size) for n in lens], device=score.device)
        excess = ((score < torch.inf).sum((-1, -2)) - allowed).clamp_min(0)
        gone = self.tables.map.own(choose(Candidates(score, last, torch.zeros_like(last, dtype=torch.bool)), excess), 2)
        return [fit(which, store.block_table.shape[-1], False) for which, store in zip(gone, stores, strict=True)]

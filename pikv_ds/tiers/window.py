"""The raw window: two pools in a layer, `near` in a light format, where entries are appended, and `far` in the codec's. Host phase.

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
from pikv_ds.pages.layers import RankPages
from pikv_ds.pages.listing import Pages, fit
from pikv_ds.pages.pool import PagePool
from pikv_ds.pages.rows import RowChange, forgets, least
from pikv_ds.pages.sizing import light_pages
from pikv_ds.retention.attention import Shares
from pikv_ds.retention.choose import Candidates, choose
from pikv_ds.retention.gathered import of_all_shards
from pikv_ds.staging import sent
from pikv_ds.step.step import Step


class RawWindow:
    """Decides when and which pages are demoted. Owns what crops may still take back; borrows pages and exchange."""

    def __init__(self, blueprint: Blueprint, pages: RankPages, exchange: Exchange, *, counted: bool) -> None:
        """counted: a retention policy is shown what queries attend to, and the attention to pages is counted with it."""
        self.pages, self.exchange = pages, exchange
        block, codec = blueprint.config.compression, blueprint.codec
        self.sinks, self.recent = block.raw_sink_tokens or 0, block.raw_recent_tokens or 0
        self.light_ratio = None if codec.light is None else codec.only.light_ratio
        self.layers = [layer for layer in pages.layers if len(layer.pools) > 1]
        self.attended = blueprint.attended  # whose score says which pages stay near under a light_ratio
        self.shares: Shares | None = None  # None: pages go by their age alone, or attention is counted elsewhere
        if self.light_ratio is not None and not counted:
            who = f"pikv.compression.method = {codec.only.name!r} (pages are encoded by the attention to them)"
            self.shares = Shares([self.attended], pages, who, nearest_only=True)
        rows = pages.rows
        self.floor = rows.ints("window.floor")  # positions of a row that may have been demoted lie below it; the same on every rank
        self.due = rows.ints("window.due", forgets)  # tokens of a row at which a page can become old enough; of this rank's shards
        self.seen = rows.ints("window.seen", least)  # tokens of a row when pages were last compared; the same on every rank
        rows.limit(self.check)
        pages.rehomed += (self._rehomed,)

    def _rehomed(self) -> None:
        """Pages of other shards lie here: any of them may be old."""
        self.due.values = [0] * len(self.due.values)

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
        light = 0 if self.light_ratio is None else max(int(self.light_ratio * n) for n in seen) + self.pages.page_size
        return max(n - floor for n, floor in zip(seen, self.floor.values, strict=True)) + light

    def after_forward(self, step: Step) -> bool:
        """Demote what has become old, unless a crop may still take back tokens. Returns whether pages moved.

        Collectives: none; with a light_ratio and several ranks one, when a row has a page of new tokens.
        """
        lens = step.lens_after_host
        if step.hold or not lens:
            return False
        size = self.pages.page_size
        old = [n - self.recent if n - self.recent >= size else 0 for n in lens]
        self.floor.values = [max(floor, n) for floor, n in zip(self.floor.values, old, strict=True)]
        if self.light_ratio is None:
            if all(n < due for n, due in zip(lens, self.due.values, strict=True)):
                return False
            gone = [self._old(layer.nearest, lens) for layer in self.layers]
        else:
            if step.decode and all(n - seen < size for n, seen in zip(lens, self.seen.values, strict=True)):
                return False
            self.seen.values = list(lens)
            gone = self._least_important(lens)
        moved = [layer.move(0, which) for layer, which in zip(self.layers, gone, strict=True)]
        if self.light_ratio is None:
            self.due.values = self._next_due(lens)
        return any(pages is not None for pages in moved)

    def _pages(self, pool: PagePool, lens: list[int]) -> Pages:
        return Pages(pool=pool, table=pool.table.ids, counts=pool.table.counts, lens=sent(lens, torch.int64, pool.device))

    def _complete(self, pages: Pages) -> Tensor:
        """[R, S, C] bool: full, and no sink in it."""
        return (pages.entries == self.pages.page_size) & (pages.slot_positions[..., 0] >= self.sinks)

    def _old(self, pool: PagePool, lens: list[int]) -> Tensor:
        """[R, S, C] bool: the pages that neither sinks nor the recent window keep near."""
        if pool.num_pages == 0:
            return torch.zeros_like(pool.table.ids, dtype=torch.bool)
        pages = self._pages(pool, lens)
        return self._complete(pages) & (pages.last_position < (pages.lens - self.recent)[:, None, None])

    def _next_due(self, lens: list[int]) -> list[int]:
        """Per row, the fewest tokens at which a page of this rank can be old, full now or when its open page has filled up."""
        size, soonest = self.pages.page_size, []
        for layer in self.layers:
            pool = layer.nearest
            fills = (size - pool.table.counts % size).amin(-1) + sent(lens, torch.int64, pool.device)  # [R]
            if pool.num_pages:
                pages = self._pages(pool, lens)
                last = torch.where(self._complete(pages), pages.last_position + 1, torch.iinfo(torch.int32).max // 2)
                fills = torch.minimum(fills, last.flatten(1).amin(-1)) if last.shape[-1] else fills
            soonest.append(fills + self.recent)
        return torch.stack(soonest).amin(0).tolist()

    def _least_important(self, lens: list[int]) -> list[Tensor]:
        """[L] of [R, S, C] bool: of the old pages of all shards the least attended, so many that the others hold light_ratio at most."""
        pools = [layer.nearest for layer in self.layers]
        columns = -(-max(lens) // self.pages.page_size) + 1
        score, last = [], []
        for pool in pools:
            old, pages = self._old(pool, lens), self._pages(pool, lens)
            value = self.attended.score(pages) if pool.num_pages else torch.zeros_like(old, dtype=torch.float32)
            score.append(fit(torch.where(old, value, torch.inf), columns, torch.inf))
            last.append(fit(pages.last_position if pool.num_pages else torch.full_like(old, -1, dtype=torch.int32), columns, -1))
        what = "gathering the attention to pages"
        score, last = of_all_shards(torch.stack(score), (torch.stack(last),), self.exchange, self.pages.map, 1, what)
        allowed = sent([light_pages(self.light_ratio, n, self.pages.page_size) for n in lens], torch.int64, score.device)
        excess = ((score < torch.inf).sum((-1, -2)) - allowed).clamp_min(0)
        gone = self.pages.map.own(choose(Candidates(score, last, torch.zeros_like(last, dtype=torch.bool)), excess), 2)
        return [fit(which, pool.table.width, False) for which, pool in zip(gone, pools, strict=True)]

"""Pools behind those of the codec (pikv_ds/pools): which pages go there after a forward. Host phase.

R request rows, S tables of a row, C columns of a table.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pikv_ds.pages.layers import RankPages
from pikv_ds.pages.listing import Pages
from pikv_ds.pages.pool import PagePool
from pikv_ds.pages.rows import RowChange
from pikv_ds.pools.base import PoolKind
from pikv_ds.staging import sent
from pikv_ds.step.step import Step


class PoolsBehind:
    """Moves pages on from pool to pool. Owns what crops may still take back; borrows the pages."""

    def __init__(self, kinds: Sequence[PoolKind], pages: RankPages) -> None:
        """kinds: of the last pools of every layer that has more than the codec's, in their order."""
        self.kinds, self.pages = tuple(kinds), pages
        self.layers = [layer for layer in pages.layers if layer.spec.window is None]
        self.floor = pages.rows.ints("behind.floor")  # positions of a row that may have left the nearest pool lie below it
        pages.rows.limit(self.check)

    def check(self, change: RowChange) -> None:
        """Raises: RuntimeError for a crop that may reach an entry of a page that can't be cut, on all ranks alike."""
        for parent, keep in zip(change.parent, change.keep, strict=True):
            floor = self.floor.values[parent] if parent >= 0 else 0
            if keep < floor:
                raise RuntimeError(
                    f"crop to {keep} of {change.lens[parent]} tokens: entries up to token {floor} may lie in a pool behind (pikv.pools[0], "
                    f"method {self.kinds[0].name!r}, keeps the latest {self.kinds[0].recent_tokens} tokens out of it) and pages there "
                    f"can't be cut; announce crops before the forward that they undo (cache.activate_past_recording(), as assisted "
                    f"generation does)"
                )

    def after_forward(self, step: Step) -> bool:
        """Move what the kinds say, unless a crop may still take back tokens. Returns whether pages moved. Collectives: none."""
        lens, moved = step.lens_after_host, False
        if step.hold or not lens:
            return False
        recent = self.kinds[0].recent_tokens
        self.floor.values = [max(floor, n - recent) for floor, n in zip(self.floor.values, lens, strict=True)]
        on_device = sent(lens, torch.int64, self.pages.device)
        for layer in self.layers:
            first = len(layer.pools) - len(self.kinds)
            for level, kind in enumerate(self.kinds, first):
                source = layer.pools[level - 1]
                if source.num_pages:
                    moved |= layer.move(level - 1, self._leaves(kind, source, on_device)) is not None
        return moved

    def _leaves(self, kind: PoolKind, pool: PagePool, lens: Tensor) -> Tensor:
        """[R, S, C] bool: full pages without recent tokens that the kind takes."""
        pages = Pages(pool=pool, table=pool.table.ids, counts=pool.table.counts, lens=lens)
        old = (pages.entries == pool.page_size) & (pages.last_position < (lens - kind.recent_tokens)[:, None, None])
        leaves = kind.leaves(pages)
        if not isinstance(leaves, Tensor) or leaves.shape != old.shape or leaves.dtype != torch.bool:
            given = f"{leaves.dtype} {list(leaves.shape)}" if isinstance(leaves, Tensor) else repr(leaves)
            raise TypeError(
                f"{type(kind).__name__}.leaves of the page pool {kind.name!r} (pikv.pools) returned {given}; it must return "
                f"bool {list(old.shape)}, a choice for each of pages.table"
            )
        return old & leaves

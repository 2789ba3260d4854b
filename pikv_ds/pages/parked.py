"""Rows that no forward runs: their entries stay for rows that come later. R active rows, Q parked ones, L layers. Host phase.

A change of rows runs over all of them: parked rows stand behind the active ones while it lasts, and apart from them in a step, which costs
nothing for them: no view, no plan and no reader sees a parked row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from pikv_ds.placement.directory import Directory

from .layer import LayerPages
from .pool import PagePool
from .rows import RowChange, Rows


class Pages(Protocol):
    """All layers' pages on a rank (layers.py)."""

    layers: list[LayerPages]
    counts: list[Tensor]
    directory: Directory
    rows: Rows

    @property
    def all_pools(self) -> list[PagePool]: ...


class ParkedRows:
    """Owns counts and tails of parked rows; their page ids lie with the tables (PageTable.parked), their homes with the directory."""

    def __init__(self, pages: Pages) -> None:
        self.pages = pages
        self.clear()

    def clear(self) -> None:
        """Nothing is parked: the tables are new."""
        self.num_rows = 0
        self.counts: list[Tensor] = []
        """By level [L, Q, S * H] int32, as RankPages.counts."""
        self._tails: dict[tuple[int, int], Tensor] = {}

    @contextmanager
    def joined(self, change: RowChange) -> Iterator[None]:
        """Inside, rows are numbered as `change` numbers them: before, 0..R-1 active and R..R+Q-1 parked; after, the same of what it makes.

        Checks the change first. Raises: as Rows.check, and then all is as before.
        """
        if not (self.num_rows or change.num_parked):
            self.pages.rows.check(change)
            yield
            return
        active = self.pages.rows.num_rows
        self._join()
        try:
            self.pages.rows.check(change)
        except BaseException:
            self._split(active, None)
            raise
        yield
        self._split(change.index.numel() - change.num_parked, change.keep)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Inside, which changes nothing, parked rows stand behind the active ones."""
        active = self.pages.rows.num_rows
        self._join()
        try:
            yield
        finally:
            self._split(active, None)

    def _join(self) -> None:
        pages = self.pages
        if self.num_rows:
            pages.counts = [torch.cat(pair, 1) for pair in zip(pages.counts, self.counts, strict=True)]
        for i, layer in enumerate(pages.layers):
            for level, pool in enumerate(layer.pools):
                pool.table.join(pages.counts[level][i])
                if (i, level) in self._tails:
                    pool.tail = torch.cat([pool.tail, self._tails[i, level]])
        pages.directory.join()
        pages.rows.join()

    def _split(self, active: int, keep: list[int] | None) -> None:
        """The first `active` rows are active, the others parked. keep: tokens of every row, None: no row has changed."""
        pages = self.pages
        self.num_rows = pages.counts[0].shape[1] - active
        self.counts = [x[:, active:].clone() for x in pages.counts]
        pages.counts = [x[:, :active].clone() for x in pages.counts]
        self._tails = {}
        for i, layer in enumerate(pages.layers):
            for level, pool in enumerate(layer.pools):
                pool.table.split(pages.counts[level][i], self._most_pages(pool, level, i))
                if pool.tail is not None and not pool.full_pages:
                    at = active * pool.table.tables_per_row
                    self._tails[i, level], pool.tail = pool.tail[at:].clone(), pool.tail[:at].clone()
        pages.directory.split(active, keep)
        pages.rows.split(active)

    def _most_pages(self, pool: PagePool, level: int, layer: int) -> int:
        counts = self.counts[level][layer]
        return -(-int(counts.max()) // pool.page_size) if counts.numel() else 0

    # ---- numbers -------------------------------------------------------------------------------------------------------------

    @property
    def entries(self) -> Tensor | int:
        """0-d int64, in all tables of parked rows on this rank. Sync: none."""
        return sum(counts.sum() for counts in self.counts) if self.num_rows else 0

    @property
    def nbytes(self) -> int:
        """Bytes of pages that parked rows alone name, and of their raw tails. Sync: reads the device."""
        if not self.num_rows:
            return 0
        alone = 0
        for pool in self.pages.all_pools:
            used = torch.zeros(pool.num_pages + 1, dtype=torch.bool, device=pool.device)
            used[pool.table.parked.flatten().long()] = True  # -1 is the spare one behind
            used[pool.table.ids.flatten().long()] = False
            alone += int(used[:-1].sum()) * pool.fmt.record_bytes
        return alone + self.tail_nbytes

    @property
    def tail_nbytes(self) -> int:
        return sum(tail.nbytes for tail in self._tails.values())

    @property
    def live_nbytes(self) -> int:
        """As PagePool.live_nbytes, of parked rows. Sync: reads the device."""
        if not self.num_rows:
            return 0
        layers = [(i, level, pool) for i, layer in enumerate(self.pages.layers) for level, pool in enumerate(layer.pools)]
        return sum(int(self.counts[level][i].sum()) * pool.fmt.record_bytes // pool.page_size for i, level, pool in layers)

    @property
    def metadata_nbytes(self) -> int:
        """Of the counts; ids and homes are counted where they lie."""
        return sum(counts.nbytes for counts in self.counts)

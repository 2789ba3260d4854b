"""What a rank that has pages tells those that run their requests: pages whose summary has changed, once queries may leave them out.

A page that holds a sink or a recent token is read whatever its summary says, so it is told of when its last token is about to leave the
recent ones: about once in its life. What has been told is marked at the page, travels with it, and is unmarked when entries come.
R rows of all ranks, L local shards, C columns (pages, or blocks of them), m columns that are told of.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pikv_ds.config.routing import RoutingConfig
from pikv_ds.pages.events import NewEntries
from pikv_ds.pages.layers import RankPages
from pikv_ds.pages.pool import PagePool
from pikv_ds.staging import sent
from pikv_ds.step.step import Step

from .extent import Extent, extent_of

TOLD = "told"
"""Summary [P, blocks] uint8: 1 = whoever runs the request knows of it."""
PLACES = 6


class PageNews(NamedTuple):
    """As one rank tells another."""

    places: Tensor
    """[m, PLACES] int32: row of its rank, global shard, column, positions of the first and the last entry, entries."""
    summaries: dict[str, Tensor]
    """name -> [m, ...]."""

    def packed(self) -> Tensor:
        """uint8 [m, width]."""
        parts = [self.places, *self.summaries.values()]
        return torch.cat([x.contiguous().flatten(1).view(torch.uint8) for x in parts], 1)

    @classmethod
    def of(cls, packed: Tensor, pool: PagePool, names: tuple[str, ...]) -> PageNews:
        """packed uint8 [m, width]."""
        kept = [by_column(pool, name) for name in names]
        sizes = [4 * PLACES, *(x.shape[1:].numel() * x.element_size() for x in kept)]
        places, *parts = (part.contiguous() for part in packed.split(sizes, 1))
        read = zip(names, kept, parts, strict=True)
        return cls(places.view(torch.int32), {name: part.view(x.dtype).view(len(part), *x.shape[1:]) for name, x, part in read})


def news_width(pool: PagePool, names: tuple[str, ...]) -> int:
    """Bytes of a column in `PageNews.packed`."""
    kept = [by_column(pool, name) for name in names]
    return 4 * PLACES + sum(x.shape[1:].numel() * x.element_size() for x in kept)


def by_column(pool: PagePool, name: str) -> Tensor:
    """A summary as [P * blocks, ...]."""
    return pool.summaries[name] if pool.blocks == 1 else pool.summaries[name].flatten(0, 1)


class Telling:
    """Owns nothing but the marks at the pages. Borrows the pages."""

    def __init__(self, pages: RankPages, config: RoutingConfig, names: tuple[str, ...]) -> None:
        """names: of the summaries that are told."""
        self.pages, self.config, self.names = pages, config, names

    def start(self) -> None:
        """The pools are new and empty."""
        for layer in self.pages.layers:
            layer.routed.add_summary(TOLD, (layer.routed.blocks,), torch.uint8)

    def wrote(self, layer: int, new: NewEntries) -> None:
        """The router has been told of entries: summaries have changed. Sync: none."""
        pool = self.pages.layers[layer].routed
        if not pool.num_pages:
            return
        told, slot = pool.summaries[TOLD].view(-1), new.slot_mapping.clamp_min(0).to(torch.int64)
        left = (new.slot_mapping < 0).to(told.dtype)  # 0 takes a mark away, 1 does nothing
        told.scatter_reduce_(0, slot // pool.block_size, left, "amin")
        group = pool.fmt.group if pool.fmt.grouped else 0
        if group > pool.block_size:  # when a group is full, other codes take the place of all its keys
            first, left = slot - slot % group, torch.where(slot % group == group - 1, left, 1)
            for begin in range(0, group, pool.block_size):
                told.scatter_reduce_(0, (first + begin) // pool.block_size, left, "amin")

    def forget(self, rows: list[bool] | None) -> None:
        """Pages of these rows, None: of all, must be told of again. Host phase."""
        for layer in self.pages.layers:
            told, ids = layer.routed.summaries[TOLD], layer.routed.table.ids
            if rows is None:
                told.zero_()
            elif len(told):
                told[ids[sent(rows, torch.bool, ids.device)].clamp_min(0).flatten().long()] = 0

    def news(self, layer: int, step: Step, whole: Tensor, silent: Tensor, most: int) -> tuple[list[Tensor], bool]:
        """What every rank is to be told of now, packed uint8 [m, width], m <= most, and whether that is not all. Marks it as told.

        Args: whole [R] bool: rows whose pages are told of in any case; silent [R] bool: rows that nothing is told of. Sync: reads how many
        they are; on the CPU that is free.
        """
        pool, marks, found, left = self.pages.layers[layer].routed, [], [], False
        owed, unit, where = self._owed(layer, step, whole, silent)
        per_row = owed.numel() // max(1, len(owed))
        for source in step.sources:
            begin, end = source.row0 * per_row, (source.row0 + source.num_rows) * per_row
            at = owed.view(-1)[begin:end].nonzero().squeeze(1)
            left, at = left or len(at) > most, at[:most]
            at_unit = unit.view(-1)[at + begin].long()
            summaries = {name: by_column(pool, name)[at_unit] for name in self.names}
            found.append(PageNews(self._places(where, at, at + begin), summaries).packed())
            marks.append(at_unit)
        pool.summaries[TOLD].view(-1)[torch.cat(marks)] = 1
        return found, left

    def _owed(self, layer: int, step: Step, whole: Tensor, silent: Tensor) -> tuple[Tensor, Tensor, Extent]:
        """[R, L, C] bool columns that are to be told of, [R, L, C] int32 their numbers in summaries, and where they lie. Sync: none."""
        pages, pool = self.pages, self.pages.layers[layer].routed
        num_rows, blocks = len(step.num_new), pool.blocks
        unit = pool.table.ids[..., : min(max(step.lens_after_host) // pool.page_size + 1, pool.table.width)]
        if blocks > 1:
            unit = (unit.unsqueeze(-1) * blocks + torch.arange(blocks, dtype=torch.int32, device=unit.device)).flatten(2)
        unit, counts = unit.contiguous(), pool.table.counts.view(num_rows, -1, 1)
        at = step.lens_after.to(torch.int32).view(-1, 1, 1)  # of the next query
        where = extent_of(pool, unit.view(-1, 1, unit.shape[2]), counts, at, self.config, pages.specs[layer].window, False)
        whole, silent = whole.view(-1, 1, 1), silent.view(-1, 1, 1)
        owed = where.visible & (~where.pinned | whole) & ~silent
        if pool.num_pages:
            owed &= pool.summaries[TOLD].view(-1)[unit.clamp_min(0).long()] == 0
        return owed, unit, where

    def _places(self, where: Extent, at: Tensor, cell: Tensor) -> Tensor:
        """[m, PLACES] int32 of columns `at` [m] among those of their rank's rows, `cell` [m] among all."""
        _, num_local, columns = where.entries.shape
        row, shard, column = at // (num_local * columns), at // columns % num_local, at % columns
        known = [x.reshape(-1)[cell] for x in (where.first, where.last, where.entries)]
        places = [row, self.pages.map.shards[shard], column, *known]
        return torch.stack([x.to(torch.int32) for x in places], 1)

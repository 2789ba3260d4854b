"""What a router is told of two pools of pages (tiers/window.py): pages demoted, and what queries read besides. P entries of a page."""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds.pages.move import Moved, entries_of, page_slots
from pikv_ds.pages.pool import LayerStore
from pikv_ds.pages.view import Stored
from pikv_ds.routers.base import NewEntries, PageQuery


def entries_moved(far: LayerStore, moved: Moved, shards_here: Tensor) -> NewEntries:
    """The entries of pages that have come into a far pool, keys as they are read from now on. shards_here [S] int64: the global
    shard of each local one."""
    slots, k, positions = page_slots(moved.target, far.page_size), entries_of(far, moved.target)[0], far.positions[moved.target].flatten()
    rows, shards = (x.repeat_interleave(far.page_size) for x in (moved.rows, moved.shards))
    return NewEntries(
        k=k if far.turned is None else far.turned.keys(k, positions), rows=rows, positions=positions, shard=shards_here[shards],
        valid=torch.ones_like(slots, dtype=torch.bool), slot_mapping=slots, table=torch.zeros_like(slots),
    )  # fmt: skip


def entries_by_page(near: Stored, asked: PageQuery, page_size: int) -> Tensor:
    """[Q, S, C] int32: entries of each near page of the queries' rows."""
    num_rows = asked.rows.stop - asked.rows.start
    first = torch.arange(near.block_table.shape[-1], device=near.seqlens.device, dtype=torch.int32) * page_size
    entries = (near.seqlens.view(num_rows, 1, -1, 1) - first).clamp(0, page_size)
    return entries.expand(-1, asked.positions.numel() // num_rows, -1, -1).flatten(0, 1)

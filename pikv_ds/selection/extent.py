"""Where the pages of a query lie: positions, what is inside its window, what it reads in any case.

Q queries, S local shards, C table columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pikv_ds.config.routing import RoutingConfig
from pikv_ds.pages.pool import PagePool
from pikv_ds.pages.view import PageView


class Extent(NamedTuple):
    """Where pages lie, [Q, S, C] each: entries (0 = not visible), positions of the first and the last, which are hidden, which pinned."""

    entries: Tensor
    visible: Tensor
    hidden: Tensor
    first: Tensor
    last: Tensor
    pinned: Tensor


def extent_of(pool: PagePool, table: Tensor, lens: Tensor, at: Tensor, config: RoutingConfig, window: int | None, in_order: bool) -> Extent:
    """Pages as queries at positions `at` [Q, 1, 1] see them. Sync: none.

    Args: table [Q * S, 1, C] int32, lens [Q, S, 1] int32 entries; in_order: without a window entry i of a table is at position i.
    """
    block_size, columns = pool.block_size, table.shape[-1]
    begin = torch.arange(columns, device=table.device, dtype=torch.int32) * block_size
    entries = (lens - begin).clamp_(0, block_size)
    visible = entries > 0
    if window is None and in_order:
        first, last = begin.expand(entries.shape), begin + (entries - 1)
    else:
        held = pool.positions if pool.num_pages else torch.zeros(1, pool.page_size, dtype=torch.int32, device=table.device)
        page, offset = torch.where(visible, table.view(entries.shape), 0), 0
        if pool.blocks > 1:
            page, offset = page // pool.blocks, page % pool.blocks * block_size
        first, last = held[page, offset], held[page, (entries - 1).clamp_min(0) + offset]
    return _seen(entries, visible, first, last, at, config, window)


def extent_from(
    first: Tensor, last: Tensor, lens: Tensor, at: Tensor, block_size: int, config: RoutingConfig, window: int | None
) -> Extent:
    """The same from positions [Q, S, C] that are known without the pages; lens [Q, S, 1] int32. Sync: none."""
    begin = torch.arange(first.shape[-1], device=first.device, dtype=torch.int32) * block_size
    entries = (lens - begin).clamp_(0, block_size)
    return _seen(entries, entries > 0, first, last, at, config, window)


def _seen(entries: Tensor, visible: Tensor, first: Tensor, last: Tensor, at: Tensor, config: RoutingConfig, window: int | None) -> Extent:
    if window is not None:
        visible = visible & (last > at - window)
        entries = torch.where(visible, entries, 0)
    pinned = (first < config.sink_tokens) | (last > at - config.recent_tokens)
    return Extent(entries, visible, ~visible, first, last, pinned)


def entries_beside(view: PageView, num_rows: int, num_queries: int, page_size: int, blocks: int = 1) -> Tensor:
    """[R * T, S, C * blocks] int32: entries of each block of page_size tokens of R rows that their T queries read besides."""
    first = torch.arange(view.block_table.shape[-1] * blocks, device=view.seqlens.device, dtype=torch.int32) * page_size
    entries = (view.seqlens.view(num_rows, 1, -1, 1) - first).clamp(0, page_size)
    return entries.expand(-1, num_queries, -1, -1).flatten(0, 1)

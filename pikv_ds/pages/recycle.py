"""Host-phase changes of a layer's tables, between steps: pages leave a window or a budget, rows are forked, cropped or dropped.

R request rows, S local shards. These functions may read sizes back to the host; nothing below attend calls them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds import ops

from .pool import LayerStore


def expire(store: LayerStore, lens: Tensor, window: int) -> int:
    """Free the leading pages that no later query can see.

    A query at position len sees positions > len - window, so a full page whose last position is <= len - window has left.

    Args: lens [R] int64, tokens of each row so far. window: W of the layer.
    Returns: entries expired.
    """
    table, page_size = store.block_table, store.page_size
    if table.shape[-1] == 0 or store.num_pages == 0:
        return 0
    full = torch.arange(table.shape[-1], device=table.device) < (store.counts // page_size).unsqueeze(-1)
    last_position = store.positions[:, -1][table.clamp_min(0)]  # [R, S, max_pages]
    gone = full & (last_position <= (lens - window)[:, None, None])
    return drop(store, gone)


def drop(store: LayerStore, gone: Tensor) -> int:
    """Take full pages out of their tables and free those that no other table names; the pages that stay close up, in their order.

    Args: gone [R, S, max_pages] bool.
    Returns: entries dropped, counted once per table.
    """
    table = store.block_table
    total = int(gone.sum())
    if total == 0:
        return 0
    store.refcount.index_add_(0, table[gone], torch.full((total,), -1, dtype=torch.int32, device=table.device))
    stays_first = gone.to(torch.int8).argsort(dim=-1, stable=True)
    store.block_table = torch.where(gone, -1, table).gather(-1, stays_first)
    store.counts -= gone.sum(-1) * store.page_size
    store.rebuild_free_stack()
    return total * store.page_size


def fork(store: LayerStore, parent: Tensor, counts: Tensor) -> None:
    """Replace the rows by forks of earlier rows, each cut to its first `counts` entries per shard.

    Forks share full pages by reference count; a partly filled page that two rows would write to is copied.

    Args:
        parent: [R'] int64, the earlier row each new row continues; -1 = a fresh row.
        counts: [R', S] int32 view that becomes store.counts; entries each new row keeps, at most what its parent had.
    """
    page_size = store.page_size
    width = store.block_table.shape[-1]
    num_kept = (counts + page_size - 1) // page_size
    table = store.block_table[parent.clamp_min(0)]
    table = torch.where(torch.arange(width, device=table.device) < num_kept.unsqueeze(-1), table, -1)
    if store.tail is not None and not store.full_pages:
        _fork_tail(store, parent, counts, table)
    store.block_table, store.counts = table.contiguous(), counts
    store.refcount = torch.bincount(table[table >= 0], minlength=store.num_pages + 1).to(torch.int32)
    store.rebuild_free_stack()
    _unshare_open_pages(store, num_kept)


def _fork_tail(store: LayerStore, parent: Tensor, counts: Tensor, table: Tensor) -> None:
    """Tails follow their rows. A row cut back into a group that was encoded gets it from its codes: what they lost stays lost."""
    fmt, source = store.fmt, parent.clamp_min(0)
    rows, num_shards = counts.shape
    old_counts, tail = store.counts, store.new_tail(counts.numel())
    if store.tail.shape[0]:
        tail.copy_(store.tail.view(-1, num_shards, *tail.shape[1:])[source].flatten(0, 1))
    store.tail = tail
    open_at = counts - counts % fmt.group  # [R', S] first entry of the open group
    encoded = (counts > open_at) & (parent >= 0).unsqueeze(-1) & (old_counts[source] >= open_at + fmt.group)
    row, shard = torch.nonzero(encoded, as_tuple=True)
    if row.numel():
        first = open_at[row, shard]
        page = table[row, shard, first // fmt.page_size]
        k, _ = ops.decode_pages(store.pages.index_select(0, page), fmt)  # [n, Hkv, page_size, Dk]
        slot = (first % fmt.page_size).unsqueeze(-1) + torch.arange(fmt.group, device=first.device)  # [n, group]
        index = slot[:, None, :, None].expand(-1, fmt.num_kv_heads, -1, fmt.k_dim)
        tail[row * num_shards + shard] = k.gather(2, index).clamp(-65504, 65504).to(tail.dtype)  # fp16 as the codes


def _unshare_open_pages(store: LayerStore, num_kept: Tensor) -> None:
    open_rows, open_shards = torch.nonzero(store.counts % store.page_size != 0, as_tuple=True)
    if open_rows.numel() == 0:
        return
    last = num_kept[open_rows, open_shards] - 1
    page = store.block_table[open_rows, open_shards, last].to(torch.int64)
    writers = torch.bincount(page, minlength=store.num_pages)[page]
    index = torch.arange(page.numel(), device=page.device)
    first = torch.full((store.num_pages,), page.numel(), device=page.device).scatter_reduce_(0, page, index, "amin")[page]
    # The first writer keeps the page, unless another row still reads it as a full page.
    copies = (index != first) | (writers < store.refcount[page])
    copies &= store.refcount[page] > 1
    num_copies = int(copies.sum())
    if num_copies == 0:
        return
    store.reserve(int(store.free_top), num_copies, 0)
    store.free_top -= num_copies
    target = store.free_stack[int(store.free_top) : int(store.free_top) + num_copies]
    source = page[copies]
    ops.migrate(store.pages, store.pages[source], target, torch.arange(num_copies, dtype=torch.int32, device=page.device))
    for summary in store.summaries.values():
        summary[target] = summary[source]
    store.block_table[open_rows[copies], open_shards[copies], last[copies]] = target
    store.refcount.index_add_(0, source, torch.full_like(source, -1, dtype=torch.int32))
    store.refcount[target] = 1

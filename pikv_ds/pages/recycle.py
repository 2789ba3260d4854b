"""Host-phase changes of a pool's tables, between steps: pages leave a window or a budget, rows are forked, cropped or dropped.

R request rows, S tables of a row. Forks read sizes back to the host; nothing below attend calls them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds import ops

from .events import PageMove
from .pool import PagePool


def expire(pool: PagePool, at: Tensor, lens: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Free the leading pages that no later query can see.

    A query at position n sees positions > n - window, so a full page whose last position is <= n - window has left.

    Args: at [R] int64, the first query that may still come to each row; lens [R] int64, tokens of each row so far. window: W of the layer.
    Returns: entries expired, 0-d int64; and [R] int64, the `at` before which no page of the row can leave. Sync: none.
    """
    table, size = pool.table, pool.page_size
    if table.width == 0 or pool.num_pages == 0:
        return torch.zeros((), dtype=torch.int64, device=pool.device), lens + window
    last = torch.where(
        torch.arange(table.width, device=pool.device) < (table.counts // size).unsqueeze(-1),
        pool.positions[:, -1][table.ids.clamp_min(0)],
        torch.iinfo(torch.int32).max,
    )  # [R, S, C], of full pages
    gone = last <= (at - window)[:, None, None]
    soonest = torch.where(gone, torch.iinfo(torch.int32).max, last).flatten(1).amin(1)
    return drop(pool, gone), torch.minimum(soonest, lens) + window  # what fills up later ends at a token that is still to come


def drop(pool: PagePool, gone: Tensor) -> Tensor:
    """Take full pages out of their tables and free those that no other table names; the pages that stay close up, in their order.

    Args: gone [R, S, max_pages] bool.
    Returns: entries dropped, counted once per table, 0-d int64. Sync: none.
    """
    entries, table = gone.sum() * pool.page_size, pool.table
    if pool.device.type == "cpu" and not bool(entries):  # elsewhere that would cost more to know than to do
        return entries
    before = table.ids.clone()
    table.close_up(gone)
    table.counts -= gone.sum(-1) * pool.page_size
    pool.allocator.release(before, gone)
    return entries


def fork(pool: PagePool, parent: Tensor, counts: Tensor) -> None:
    """Replace the rows by forks of earlier rows, each cut to its first `counts` entries per table.

    Forks share full pages by reference count; a partly filled page that two rows would write to is copied. Counters are not shared.

    Args:
        parent: [R'] int64, the earlier row each new row continues; -1 = a fresh row.
        counts: [R', S] int32 view that becomes the table's counts; entries each new row keeps, at most what its parent had.
    """
    old_counts, table = pool.table.counts, pool.table
    if pool.counters and len({p for p in parent.tolist() if p >= 0}) < int((parent >= 0).sum()):
        pool.part_counters()
    table.fork(parent, counts, pool.page_size)
    pool.allocator.recount(table.ids[table.ids >= 0])
    pool.bring_open_pages_near()
    if pool.tail is not None and not pool.full_pages:
        _fork_tail(pool, parent, old_counts)
    _unshare_open_pages(pool)


def _fork_tail(pool: PagePool, parent: Tensor, old_counts: Tensor) -> None:
    """Tails follow their rows. A row cut back into a group that was encoded gets it from its codes: what they lost stays lost."""
    fmt, source, counts = pool.fmt, parent.clamp_min(0), pool.table.counts
    num_tables, tail = counts.shape[1], pool.new_tail(counts.numel())
    if pool.tail.shape[0]:
        tail.copy_(pool.tail.view(-1, num_tables, *tail.shape[1:])[source].flatten(0, 1))
    pool.tail = tail
    open_at = counts - counts % fmt.group  # [R', S] first entry of the open group
    encoded = (counts > open_at) & (parent >= 0).unsqueeze(-1) & (old_counts[source] >= open_at + fmt.group)
    row, at = torch.nonzero(encoded, as_tuple=True)
    if row.numel():
        first = open_at[row, at]
        page = pool.table.ids[row, at, first // fmt.page_size]
        k, _ = ops.decode_pages(pool.pages.index_select(0, page), fmt)  # [n, Hkv, page_size, Dk]
        slot = (first % fmt.page_size).unsqueeze(-1) + torch.arange(fmt.group, device=first.device)  # [n, group]
        index = slot[:, None, :, None].expand(-1, fmt.num_kv_heads, -1, fmt.k_dim)
        tail[row * num_tables + at] = k.gather(2, index).clamp(-65504, 65504).to(tail.dtype)  # fp16 as the codes


def _unshare_open_pages(pool: PagePool) -> None:
    table, refcount = pool.table, pool.allocator.refcount
    row, at = torch.nonzero(table.counts % pool.page_size != 0, as_tuple=True)
    if row.numel() == 0:
        return
    last = table.counts[row, at] // pool.page_size
    page = table.ids[row, at, last].to(torch.int64)
    writers = torch.bincount(page, minlength=pool.num_pages)[page]
    index = torch.arange(page.numel(), device=page.device)
    first = torch.full((pool.num_pages,), page.numel(), device=page.device).scatter_reduce_(0, page, index, "amin")[page]
    # The first writer keeps the page, unless another row still reads it as a full page.
    copies = (index != first) | (writers < refcount[page])
    copies &= refcount[page] > 1
    num_copies = int(copies.sum())
    if num_copies == 0:
        return
    target, source = pool.take(num_copies), page[copies]
    ops.migrate(pool.pages, pool.pages[source], target, torch.arange(num_copies, dtype=torch.int32, device=page.device))
    for summary in pool.summaries.values():
        summary[target.long()] = summary[source]
    table.ids[row[copies], at[copies], last[copies]] = target
    pool.allocator.unshare(source)
    for tell in pool.events.moved:
        tell(PageMove(pool.level, source, target.long(), copied=True))

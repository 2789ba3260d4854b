"""assign_slots in torch: fixed shapes, no sync. N tokens, R rows, S shards, P pages."""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds.ops import checks


def assign_slots(
    counts: Tensor, block_table: Tensor, free_stack: Tensor, free_top: Tensor, refcount: Tensor, rows: Tensor, shard: Tensor | None,
    here: Tensor | None, page_size: int, one_per_row: bool, may_open: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    checks.assign_slots(counts, block_table, free_stack, free_top, refcount, rows, shard, here)
    num_shards, width = block_table.shape[1:]
    stored = torch.ones_like(rows, dtype=torch.bool) if here is None else here
    column = None if shard is None else torch.where(stored, shard, 0)
    cell = rows if column is None else rows * num_shards + column  # [N] index of (row, shard)
    index = counts.view(-1)[cell] if one_per_row else entry_index(rows, column, stored, counts)
    index = index if one_per_row or here is None else index.clamp_min(0)
    offset = index % page_size
    entry = cell * width + torch.div(index, page_size, rounding_mode="floor")  # [N] index into the flat block table
    table = block_table.view(-1)
    if may_open:
        _open_pages(table, free_stack, free_top, refcount, entry, (offset == 0) & stored)
    counts.view(-1).index_add_(0, cell, stored.to(torch.int32))
    slots = (table[entry] * page_size + offset).to(torch.int32)
    cell = cell.to(torch.int32)
    return (slots, cell) if here is None else (torch.where(here, slots, -1), torch.where(here, cell, 0))


def _open_pages(table: Tensor, free_stack: Tensor, free_top: Tensor, refcount: Tensor, entry: Tensor, opens: Tensor) -> None:
    """Pop one page per token that starts one. Tokens that start none park a -1 in the table's last column, which stays unused."""
    spare = refcount.numel() - 1
    page = free_stack[torch.where(opens, free_top - opens.cumsum(0), spare)]
    table.index_put_((torch.where(opens, entry, table.numel() - 1),), torch.where(opens, page, -1))
    refcount.index_add_(0, torch.where(opens, page, spare), opens.to(torch.int32))
    free_top -= opens.sum()


def entry_index(rows: Tensor, column: Tensor | None, here: Tensor, counts: Tensor) -> Tensor:
    """The index of each new entry inside its (row, shard) list.

    Args:
        rows: [N] int64, ascending. column: [N] int64 local shard, in range also where not here; None = one shard.
        here: [N] bool, stored on this rank. counts: [R, S] int entries before this step.

    Returns: [N] int64, -1 where not here. Sync: none.
    """
    first = torch.searchsorted(rows, rows)  # first token of each row
    if column is None:
        running = here.cumsum(0) - here.to(torch.int64)  # entries of this step before each token, all rows
        return torch.where(here, counts[:, 0][rows] + running - running[first], -1)
    onehot = (column.unsqueeze(-1) == torch.arange(counts.shape[1], device=rows.device)) & here.unsqueeze(-1)
    running = onehot.cumsum(0) - onehot.to(torch.int64)
    column = column.unsqueeze(-1)
    before = running.gather(1, column).squeeze(-1) - running[first].gather(1, column).squeeze(-1)
    return torch.where(here, counts[rows, column.squeeze(-1)] + before, -1)

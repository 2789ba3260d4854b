"""Slots for new entries, taken from the free stack of a store."""

from __future__ import annotations

from torch import Tensor

from .library import OPS


def assign_slots(
    counts: Tensor,
    block_table: Tensor,
    free_stack: Tensor,
    free_top: Tensor,
    refcount: Tensor,
    rows: Tensor,
    shard: Tensor | None,
    here: Tensor | None,
    *,
    page_size: int,
    one_per_row: bool = False,
    may_open: bool = True,
) -> tuple[Tensor, Tensor]:
    """Put each of N entries behind the last one of its (row, shard) table; a table whose pages are full takes one from the stack.

    Args:
        counts: [R, S] int32 entries of each table, changed. block_table: [R, S, max_pages] int32, changed; its last column stays unused.
        free_stack: [P + 1] int32, the first free_top are free pages. free_top: 0-d int64, changed. refcount: [P + 1] int32, changed.
        rows: [N] int64 ascending. shard: [N] int64, read where `here`; None = S is 1.
        here: [N] bool, stored on this rank; None = all are.
        one_per_row: no row has two tokens. may_open: some entry may need a page. Both known on the host; they save work on a device.

    Returns: slot_mapping [N] int32, page * page_size + offset, -1 = not stored here; tables [N] int32, row * S + shard (0 where not here).

    Sync: none. Errors: on the CPU, a page that is needed and not there; the caller reserves before (on a device nothing can tell).
    """
    return OPS.assign_slots(counts, block_table, free_stack, free_top, refcount, rows, shard, here, page_size, one_per_row, may_open)

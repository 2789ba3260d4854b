"""What the ops of a plain decode step are given of a pool: looked up once, and right until memory of the pages is replaced (addresses.py).

R request rows, H heads, D head_dim. A plain step stores one token of each row in the one table of that row, and reads the whole table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds.ops.library import CALLS

from .pool import PagePool


class PlainTables:
    """The tables of a pool, one per row. Owns nothing; made anew when the generation of the rank's addresses is another."""

    __slots__ = ("_layout", "_pages", "_place", "_read", "_tail", "_tail_rows", "_window", "_size")

    def __init__(self, pool: PagePool, window: int | None) -> None:
        """window: of the layer; None = all tokens."""
        table, free, fmt = pool.table, pool.allocator, pool.fmt
        self._layout, self._size, self._window = fmt.layout, pool.page_size, window or 0
        self._place = (table.counts, table.ids, free.free_stack, free.free_top, free.refcount)
        self._pages, self._read = pool.pages, (table.ids, table.counts)
        self._tail, self._tail_rows = pool.tail, None
        if pool.tail is not None:
            self._tail_rows = torch.arange(table.num_rows, dtype=torch.int32, device=pool.device)

    @staticmethod
    def of(pool: PagePool, window: int | None) -> PlainTables | None:
        """None: its pages are in several tables of a row, or are read in another way."""
        plain = pool.table.tables_per_row == 1 and pool.maps is None and pool.reader.as_stored
        return PlainTables(pool, window) if plain and pool.num_pages and pool.table.num_rows else None

    def decode(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, positions: Tensor, scale: float, may_open: bool) -> Tensor:
        """Store a token of every row, and attend to all that its row then has: [R, Hq, Dv] f32.

        Args: q [R, Hq, D], k and v [R, H, D], contiguous. rows [R] int64: 0, 1, ...; positions [R] int32. may_open: as for PagePool.append.

        Sync: none. The same ops with the same arguments as PagePool.append and RawReader.attend, so the same bits.
        """
        pages, tail, layout = self._pages, self._tail, self._layout
        slots, tables = CALLS.assign_slots(*self._place, rows, None, None, self._size, True, may_open)
        CALLS.append(pages, tail, k, v, positions, slots, None if tail is None else tables, *layout)
        asked = positions if self._window else None
        return CALLS.decode(q, pages, *self._read, asked, None, tail, self._tail_rows, *layout, scale, self._window, False, 0, 0)[0]

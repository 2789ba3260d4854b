"""Single entries read back from pages, for policies: keys and values as attention meets them."""

from __future__ import annotations

from torch import Tensor

from .pool import PagePool


def read_back(pool: PagePool, table: Tensor, counts: Tensor, tail_rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """k [R * S, H, L, Dk] and v [R * S, H, L, Dv], f32; see PageReader.entries. Sync: none."""
    return pool.reader.entries(table, counts, tail_rows)

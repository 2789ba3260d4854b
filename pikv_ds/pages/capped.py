"""Pages of a layer that bounds its scores, c tanh(score / c): decoded, then attended to in plain torch, as the compiled ops know no cap."""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds import ops

from .pool import PagePool
from .unrotated import UnrotatedReader


class CappedReader(UnrotatedReader):
    """The pages.view.PageReader of a pool of keys as queries meet them. Slower than RawReader, exact."""

    def __init__(self, pool: PagePool, softcap: float) -> None:
        self.pool, self.softcap, self.k_dim = pool, softcap, pool.fmt.k_dim

    def met(self, k: Tensor, positions: Tensor) -> Tensor:
        return k

    def bounds(self, out: Tensor, slot_mapping: Tensor, table: Tensor) -> None:
        options = {} if self.pool.tail is None else {"tail": self.pool.tail, "tail_rows": table}
        ops.page_bounds(out, self.pool.pages, self.pool.fmt, slot_mapping, **options)

    def bounds_shape(self, dtype: torch.dtype) -> tuple[int, int, int]:
        return ops.bounds_shape(self.pool.fmt, dtype, self.k_dim)

    def _keys(self, c: Tensor, at: Tensor) -> Tensor:
        return c

    def _values(self, v: Tensor) -> Tensor:
        return v

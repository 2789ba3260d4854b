"""Pages that hold keys as queries meet them: attention and entries straight from the records, by the compiled ops."""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds import ops
from pikv_ds.ops.library import CALLS

from .pool import PagePool
from .view import PageView, Read

# From this many queries per row on, decoding the pages once into dense K and V costs less than reading them query by query.
# 4,096 entries, 1 thread: f32 crosses between 2 and 8 queries, bf16 between 4 and 32, the compressed formats above 32.
DENSE_FROM_RAW, DENSE_FROM_COMPRESSED = 5, 33


class RawReader:
    """The pages.view.PageReader of a pool whose numbers are read as they are: of keys, or of coefficients that queries are folded to."""

    rebuilds, as_stored, table_per_head = False, True, True

    def __init__(self, pool: PagePool) -> None:
        self.pool, self.k_dim = pool, pool.fmt.k_dim

    def attend(self, q: Tensor, view: PageView, *, scale: float, window: int | None = None, q_positions: Tensor | None = None) -> Read:
        pool, q = self.pool, q.contiguous()
        args = (pool.pages, pool.fmt, view.block_table, view.seqlens)
        options = {"scale": scale, "window": window}
        if view.tail is not None:
            options |= {"tail": view.tail, "tail_rows": view.tail_rows}
        num_queries = q.shape[1]
        if num_queries == 1:
            out, lse, _ = ops.decode(
                q.squeeze(1), *args, q_positions=None if window is None else q_positions.reshape(-1).contiguous(), **options
            )
            return Read(out.unsqueeze(1), lse.unsqueeze(1))
        if num_queries < (DENSE_FROM_RAW if pool.fmt.raw else DENSE_FROM_COMPRESSED):
            return Read(*ops.prefill_cached(q, *args, q_positions.contiguous(), **options))
        return Read(*ops.paged_attention(q, *args, q_positions=q_positions, **options))

    def attend_pages(self, q: Tensor, view: PageView, *, scale: float) -> Read:
        """Each query reads its pages by itself, which gives the lse of every page with it; only a long chunk costs more that way."""
        num_rows, num_queries = q.shape[:2]
        view = view.per_query(num_rows, num_queries)
        read = self.attend_listed(q.flatten(0, 1).contiguous(), view, None, scale=scale, window=None, q_positions=None, page_lse=True)
        out, lse = (x.unflatten(0, (num_rows, num_queries)) for x in read[:2])
        return Read(out, lse, read.page_lse.unflatten(0, (num_rows, num_queries, -1)))

    def attend_listed(
        self,
        q: Tensor,
        view: PageView,
        page_list: Tensor | None,
        *,
        scale: float,
        window: int | None = None,
        q_positions: Tensor | None = None,
        page_lse: bool = False,
        block_size: int = 0,
    ) -> Read:
        # ops.decode, without the words between: this call is made in every layer of every step.
        out, lse, of_pages = CALLS.decode(
            q, self.pool.pages, view.block_table, view.seqlens, q_positions, page_list, view.tail, view.tail_rows, *self.pool.fmt.layout,
            scale, window or 0, page_lse, 0, block_size,
        )  # fmt: skip
        return Read(out, lse, of_pages if page_lse else None)

    def met(self, k: Tensor, positions: Tensor) -> Tensor:
        return k

    def entries(self, table: Tensor, counts: Tensor, tail_rows: Tensor | None) -> tuple[Tensor, Tensor]:
        tail = None if tail_rows is None or self.pool.tail is None else self.pool.tail[tail_rows.flatten()]
        return self.pool.decoded(table.flatten(0, 1), counts.flatten(), tail)

    def bounds_shape(self, dtype: torch.dtype) -> tuple[int, int, int]:
        return ops.bounds_shape(self.pool.fmt, dtype, self.k_dim)

    def bounds(self, out: Tensor, slot_mapping: Tensor, table: Tensor) -> None:
        options = {} if self.pool.tail is None else {"tail": self.pool.tail, "tail_rows": table}
        options["block_size"] = self.pool.block_size
        ops.page_bounds(out, self.pool.pages, self.pool.fmt, slot_mapping, **options)

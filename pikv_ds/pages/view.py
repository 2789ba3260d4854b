"""What readers see of a pool: the tables of some rows, now or as they were; and what a reader is. Knows no pool.

R request rows, S local shards, T queries per row, N tables, C columns of a table, P entries of a page. X is H, the kv heads, where every
head has pages of its own (a list per head, or tables per head), else 1.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Before(NamedTuple):
    """A pool as it was before this forward's entries: counts [R, S] int32, and the raw tails (None: no groups)."""

    counts: Tensor
    tail: Tensor | None


class PageView(NamedTuple):
    """Tables of R rows as ops take them: block_table [R * S, 1, C], seqlens [R * S, 1]; raw tails and their rows, or None.

    With a page per kv head: [R * S, Hkv, C] and [R * S, Hkv], S shards.
    """

    block_table: Tensor
    seqlens: Tensor
    tail: Tensor | None
    tail_rows: Tensor | None

    def only(self, read: Tensor) -> PageView:
        """Without the tables that somebody else reads: read [R, S] bool of R rows."""
        return self._replace(seqlens=torch.where(read.flatten().unsqueeze(1), self.seqlens, 0))

    def of_rows(self, rows: Tensor, num_rows: int) -> PageView:
        """The tables of some of the R = num_rows rows; rows [n] int64."""

        def of(x: Tensor) -> Tensor:
            return x.unflatten(0, (num_rows, -1)).index_select(0, rows).flatten(0, 1)

        return PageView(of(self.block_table), of(self.seqlens), self.tail, None if self.tail_rows is None else of(self.tail_rows))

    def per_query(self, num_rows: int, num_queries: int) -> PageView:
        """The tables of every row once for each of its queries, [R * T * S, ...]."""
        if num_queries == 1:
            return self
        tail_rows = None if self.tail_rows is None else per_query(self.tail_rows, num_rows, num_queries)
        return PageView(*(per_query(x, num_rows, num_queries) for x in self[:2]), self.tail, tail_rows)


class Read(NamedTuple):
    """Attention over coefficients or values as pages hold them; 0 and -inf where nothing was read."""

    out: Tensor
    """[..., Hq, Dv] f32."""
    lse: Tensor
    """[..., Hq] f32."""
    page_lse: Tensor | None = None
    """[..., S, Hq, C] f32, of each page that was read by itself; None = nobody asked."""


class PageReader(Protocol):
    """How a pool's pages are read. Pools know bytes, readers know keys."""

    k_dim: int
    """Width of a key as queries meet it."""
    table_per_head: bool
    """attend_listed takes a table for each head of pages that hold all heads."""
    rebuilds: bool
    """Keys and values are put together again where they are read; otherwise maps are folded into queries and outputs."""
    as_stored: bool
    """One query per row is ops.decode of the pool's records as they are, and nothing else."""

    def attend(self, q: Tensor, view: PageView, *, scale: float, window: int | None = None, q_positions: Tensor | None = None) -> Read:
        """q [R, T, Hq, Dk] to all entries; q_positions [R, T] int32, needed with a window or several queries. Sync: none."""

    def attend_pages(self, q: Tensor, view: PageView, *, scale: float) -> Read:
        """As attend without a window, with the lse of every page: page_lse [R, T, S, Hq, C]. Sync: none."""

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
        """One query q [Q, Hq, Dk] for every S tables of the view, to the columns page_list [Q * S, X, K] int32 (-1 = none; None: all).

        block_size: columns are blocks of so many tokens, 0 = pages; readers that rebuild keys have pages only.

        Returns: out [Q, Hq, Dv], lse [Q, Hq], page_lse [Q * S, Hq, K]. Sync: none.
        """

    def met(self, k: Tensor, positions: Tensor) -> Tensor:
        """What queries meet of keys [..., H, D] as pages hold them, at positions [...]."""

    def entries(self, table: Tensor, counts: Tensor, tail_rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """k [R * S, H, L, Dk] and v [R * S, H, L, Dv], f32, of tables [R, S, C] with counts [R, S]; anything where no entry is. Sync: none.

        As attention meets them, L = C * P slots. tail_rows [R, S] int64, the rows of the raw tail; None = the keys of open groups do not
        matter. With a page per kv head the heads of a request are rows, and H is 1.
        """

    def bounds_shape(self, dtype: torch.dtype) -> tuple[int, int, int]:
        """Of the bounds of one page, ops.bounds_shape for keys as queries meet them."""

    def bounds(self, out: Tensor, slot_mapping: Tensor, table: Tensor) -> None:
        """ops.page_bounds of the entries in slot_mapping [N] int32 (-1 = none here) of tables [N] int32, in place. Sync: none."""


def per_query(x: Tensor, num_rows: int, num_queries: int) -> Tensor:
    """[R * S, ...] -> [R * T * S, ...]: the tables of a row once per query."""
    if num_queries == 1:
        return x
    by_row = x.unflatten(0, (num_rows, 1, -1))
    return by_row.expand(-1, num_queries, *[-1] * x.dim()).flatten(0, 2).contiguous()  # of one row and shard that is a view

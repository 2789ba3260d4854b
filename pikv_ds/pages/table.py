"""Which pages hold the entries of which request, shard and head: page ids and counts. The one home of the (shard, head) axis.

R request rows, S local shards, H heads with tables of their own (1: a page holds all heads), C columns of a table. Table s * H + h of a row
is that of head h in shard s; outside of this file tables are tables.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .addresses import Addresses
from .allocator import GROWTH


class PageTable:
    """Owns the ids; `counts` is a view into a tensor that a rank reads once per step."""

    def __init__(self, counts: Tensor, heads: int = 1, addresses: Addresses | None = None) -> None:
        """addresses: told when a tensor of the table is replaced; None: nobody asks."""
        self.heads, self._addresses = heads, addresses or Addresses()
        self.counts = counts
        """[R, S * H] int32 entries, those that have left not among them."""
        self.ids = torch.full((*counts.shape, 0), -1, dtype=torch.int32, device=counts.device)
        """[R, S * H, C] int32 page ids, -1 = none; the last column stays unused: append parks its idle writes there."""
        self.parked = self.ids[:0].clone()
        """[Q, S * H, C'] int32 page ids of rows that no step sees (pages/parked.py)."""
        self.counted: dict[str, Tensor] = {}
        """name -> [R, S * H, C], contiguous, 0 where no page is: what is counted of pages, once tables share some (pages/pool.py)."""

    @property
    def num_rows(self) -> int:
        return self.counts.shape[0]

    @property
    def tables_per_row(self) -> int:
        """S * H."""
        return self.counts.shape[1]

    @property
    def width(self) -> int:
        """C."""
        return self.ids.shape[-1]

    @property
    def nbytes(self) -> int:
        """Of the ids; the counts are counted where they lie."""
        return self.ids.nbytes + self.parked.nbytes

    def of(self, shard: Tensor | None, num_tokens: int) -> Tensor:
        """[N * H] int64, within a row: the tables of all heads of local shard [N] of N tokens; None: there is one shard."""
        head = torch.arange(self.heads, device=self.ids.device).repeat(num_tokens)
        return head if shard is None else head + shard.repeat_interleave(self.heads) * self.heads

    def numbers(self, rows: Tensor) -> Tensor:
        """[n * S * H] int64: where the tables of rows [n] stand among those of all rows."""
        return (rows.unsqueeze(1) * self.tables_per_row + torch.arange(self.tables_per_row, device=rows.device)).flatten()

    def by_head(self, x: Tensor) -> Tensor:
        """[R, S * H, ...] -> [R * H, S, ...]: every head of a row as a row."""
        return by_head(x, self.heads)

    def by_table(self, x: Tensor) -> Tensor:
        """[R * H, S, ...] -> [R, S * H, ...]."""
        return by_table(x, self.heads)

    def by_shard(self, x: Tensor) -> Tensor:
        """[R, S * H, ...] -> [R, S, H, ...]."""
        return x.unflatten(1, (-1, self.heads))

    # ---- host phase ----------------------------------------------------------------------------------------------------------

    def widen(self, pages: int) -> None:
        """Make room for `pages` pages per table, and the spare column. Sync: none."""
        if pages >= self.width:
            self._addresses.moved()
            width = pages + 1 + pages // GROWTH
            self.counted = {name: torch.nn.functional.pad(x, (0, width - self.width)) for name, x in self.counted.items()}
            self.ids = torch.nn.functional.pad(self.ids, (0, width - self.width), value=-1)

    def close_up(self, gone: Tensor) -> None:
        """Take pages out; those that stay close up, in their order, in place. Counts are the caller's affair. Sync: none.

        Args: gone [R, S * H, C] bool.
        """
        stays_first = gone.to(torch.int8).argsort(dim=-1, stable=True)
        torch.gather(torch.where(gone, -1, self.ids), -1, stays_first, out=self.ids)
        for x in self.counted.values():
            torch.gather(torch.where(gone, 0, x), -1, stays_first, out=x)

    def fork(self, parent: Tensor, counts: Tensor, page_size: int) -> None:
        """Rows become earlier rows, each cut to its first `counts` entries per table.

        Args: parent [R'] int64, -1 = a fresh row; counts [R', S * H] int32 view, at most what the parent had.
        """
        self._addresses.moved()
        num_kept = (counts + page_size - 1) // page_size
        source, kept = parent.clamp_min(0), torch.arange(self.width, device=self.ids.device) < num_kept.unsqueeze(-1)
        self.ids, self.counts = torch.where(kept, self.ids[source], -1).contiguous(), counts
        self.counted = {name: torch.where(kept, x[source], 0).contiguous() for name, x in self.counted.items()}

    def renumber(self, new_id: Tensor) -> None:
        """Pages have other ids: new_id [P] int32."""
        self._addresses.moved()
        self.ids, self.parked = (torch.where(ids >= 0, new_id[ids.clamp_min(0)], -1) for ids in (self.ids, self.parked))

    def join(self, counts: Tensor) -> None:
        """Parked rows stand behind the others; counts [R + Q, S * H] int32 view of all. What is counted of pages has no parked rows."""
        assert not self.counted, "rows whose pages are counted can't be parked"
        width = max(self.width, self.parked.shape[-1] + 1) if self.parked.shape[-1] else self.width
        ids = [torch.nn.functional.pad(x, (0, width - x.shape[-1]), value=-1) for x in (self.ids, self.parked)]
        self.ids, self.counts = torch.cat(ids) if len(self.parked) else ids[0], counts
        self.parked = self.ids[:0].clone()

    def split(self, counts: Tensor, most_pages: int) -> None:
        """The other way: the first rows, as many as counts [R, S * H] has, are active; parked ones have at most so many pages per table."""
        ids = self.ids
        self.ids, self.parked, self.counts = ids[: len(counts)].clone(), ids[len(counts) :, :, :most_pages].clone(), counts


def by_head(x: Tensor, heads: int) -> Tensor:
    """[R, S * H, ...] of tables -> [R * H, S, ...]: every head of a row as a row."""
    return x if heads == 1 else x.unflatten(1, (-1, heads)).transpose(1, 2).flatten(0, 1)


def by_table(x: Tensor, heads: int) -> Tensor:
    """[R * H, S, ...] -> [R, S * H, ...]."""
    return x if heads == 1 else x.unflatten(0, (-1, heads)).transpose(1, 2).flatten(1, 2)

"""What the rank that runs requests knows of their pages, wherever these lie: places, positions, and a copy of their summaries.

It places its own entries, so it follows which page an entry goes into by itself; what a router keeps of a page is made where the page lies,
and comes from there (selection/page_news.py). R rows of this rank, S shards of all ranks, C columns, n tokens. A column is what is chosen
as one, a page or a block of one, and is numbered as in the tables of the rank that has it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds.config.routing import RoutingConfig
from pikv_ds.pages.pool import PagePool

from .extent import Extent, extent_from
from .page_news import PageNews

GROWTH = 8  # columns are added an eighth at a time


class OutlinedPool:
    """As much of a pool as a router asks for that goes by summaries: `blocks` are columns, so they are its pages."""

    blocks = 1

    def __init__(self, pool: PagePool, summaries: dict[str, Tensor]) -> None:
        self.fmt, self.page_size, self.block_size, self.summaries = pool.fmt, pool.block_size, pool.block_size, summaries


class Outline:
    """Of one layer. Positions and counts are kept up with every forward; summaries as they come."""

    def __init__(self, pool: PagePool, names: tuple[str, ...], num_rows: int, num_shards: int) -> None:
        """names: of the pool's summaries that are copied."""
        self.pool, self.size, self.device = pool, pool.block_size, pool.device
        self.counts = torch.zeros(num_rows, num_shards, dtype=torch.int64, device=self.device)
        self.first, self.last = (torch.zeros(num_rows * num_shards, 1, dtype=torch.int32, device=self.device) for _ in range(2))
        """[R * S, C]; the last column takes what is meant for none."""
        self.summaries = {}
        for name in names:
            kept = pool.summaries[name]
            self.summaries[name] = kept.new_zeros(num_rows * num_shards, 1, *kept.shape[1 if pool.blocks == 1 else 2 :])

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.counts, self.first, self.last, *self.summaries.values()))

    @property
    def columns(self) -> int:
        return self.last.shape[1] - 1

    def reserve(self, new: int, longest: int) -> None:
        """Room for `new` further tokens of a row, of at most `longest`. Sync: reads the fullest shard; on the CPU that is free."""
        if self.counts.numel():
            self.widen(max(1, -(-min(longest, int(self.counts.max()) + new) // self.size)))

    def widen(self, columns: int) -> None:
        if columns <= self.columns:
            return
        more = columns + columns // GROWTH - self.columns
        grown = lambda x: torch.cat([x, x.new_zeros(x.shape[0], more, *x.shape[2:])], 1)  # noqa: E731
        self.first, self.last = grown(self.first), grown(self.last)
        self.summaries = {name: grown(x) for name, x in self.summaries.items()}

    def move(self, rows: Tensor) -> None:
        """Row i goes on as row rows[i] was, -1 = nothing is known of it; rows [R'] int64. Sync: none."""
        num_shards = self.counts.shape[1]
        gone, source = (rows < 0).repeat_interleave(num_shards), rows.clamp_min(0)
        table = (source.unsqueeze(1) * num_shards + torch.arange(num_shards, device=rows.device)).flatten()
        taken = lambda x: x[table] if len(x) else x.new_zeros(len(table), *x.shape[1:])  # noqa: E731
        self.first, self.last = (taken(x).masked_fill_(gone.unsqueeze(1), 0) for x in (self.first, self.last))
        self.counts = taken(self.counts.view(-1)).masked_fill_(gone, 0).view(-1, num_shards)
        self.summaries = {name: taken(x) for name, x in self.summaries.items()}

    def forget(self, rows: Tensor) -> None:
        """rows [R] bool: nothing is known of these. Sync: none."""
        self.counts.masked_fill_(rows.unsqueeze(1), 0)
        tables = rows.repeat_interleave(self.counts.shape[1]).unsqueeze(1)
        self.first.masked_fill_(tables, 0)
        self.last.masked_fill_(tables, 0)

    def note(self, rows: Tensor, positions: Tensor, valid: Tensor, shard: Tensor) -> None:
        """Entries are stored. rows [n] int64, of this rank, ascending; positions [n]; valid [n] bool; shard [n] int64. Sync: none."""
        num_shards, num_tables = self.counts.shape[1], self.counts.numel()
        if not num_tables:
            return
        table = torch.where(valid, rows * num_shards + shard, num_tables)
        order = table.argsort(stable=True)
        table = table[order]
        nth = torch.arange(len(table), device=self.device) - torch.searchsorted(table, table)  # of the new ones in its table
        real = table < num_tables
        index = self.counts.view(-1)[table.clamp_max(num_tables - 1)] + nth
        at = torch.where(real, table * self.last.shape[1] + index // self.size, self.columns)
        position = positions[order].to(torch.int32)
        begins = torch.where(real & (index % self.size == 0), at, self.columns)
        self.first.view(-1)[begins] = position
        self.last.view(-1).scatter_reduce_(0, at, torch.where(real, position, 0), "amax")
        self.counts.view(-1).index_add_(0, table.clamp_max(num_tables - 1), real.to(torch.int64))

    def put(self, news: PageNews) -> None:
        """What the ranks that have them say of pages. Sync: the highest column."""
        if not len(news.places):
            return
        row, shard, column, first, last, entries = news.places.to(torch.int64).unbind(1)
        self.widen(int(column.max()) + 1)
        table = row * self.counts.shape[1] + shard
        at = table * self.last.shape[1] + column
        self.first.view(-1)[at], self.last.view(-1)[at] = first.to(torch.int32), last.to(torch.int32)
        for name, x in news.summaries.items():
            self.summaries[name].flatten(0, 1)[at] = x
        self.counts.view(-1).scatter_reduce_(0, table, column * self.size + entries, "amax")

    def expire(self, at: Tensor, window: int) -> None:
        """As pages/recycle.py does it with the pages themselves: at [R] int64, the first query that may still come. Sync: as `drop`."""
        blocks = self.pool.blocks
        full = torch.arange(self.columns, device=self.device) < (self.counts // self.pool.page_size * blocks).unsqueeze(-1)
        leaves = full & (self.last[:, :-1].view(full.shape) <= (at - window)[:, None, None])
        self.drop(leaves[..., blocks - 1 :: blocks])  # a page by its last block

    def drop(self, gone: Tensor) -> None:
        """Full pages gone [R, S, C'] bool leave, and the others close up, as in the tables of their ranks. Sync: whether any do."""
        if not bool(gone.any()):
            return
        blocks, width = self.pool.blocks, self.last.shape[1]
        self.counts.sub_(gone.sum(-1) * self.pool.page_size).clamp_min_(0)  # not all that went may have been known
        gone = gone.flatten(0, 1).repeat_interleave(blocks, 1)[:, : self.columns]
        gone = torch.nn.functional.pad(gone, (0, width - gone.shape[1]))
        column = gone.to(torch.int8).argsort(dim=1, stable=True)
        self.first, self.last = (
            self.first.gather(1, column),
            self.last.gather(1, column).masked_fill_(torch.arange(width, device=self.device) >= width - gone.sum(1, keepdim=True), 0),
        )
        for name, x in self.summaries.items():
            self.summaries[name] = x.gather(1, column.view(*column.shape, *[1] * (x.dim() - 2)).expand_as(x))

    def extent(self, at: Tensor, config: RoutingConfig, window: int | None) -> Extent:
        """Pages as queries at positions `at` [R] int32 see them, one for each row, [R, S, C] each. Sync: none."""
        shape = (*self.counts.shape, self.columns)
        first, last = (x[:, :-1].reshape(shape) for x in (self.first, self.last))
        return extent_from(first, last, self.counts.unsqueeze(-1).to(torch.int32), at.view(-1, 1, 1), self.size, config, window)

    @property
    def table(self) -> Tensor:
        """[R * S, 1, C] int32, where columns have their summaries."""
        width = self.last.shape[1]
        table = torch.arange(self.counts.numel() * width, dtype=torch.int32, device=self.device)
        return table.view(-1, 1, width)[..., :-1].contiguous()

    @property
    def outlined(self) -> OutlinedPool:
        """As a router is asked with it."""
        return OutlinedPool(self.pool, {name: x.flatten(0, 1) for name, x in self.summaries.items()})

"""The pages of a layer as a retention policy sees them, of one pool or of several as if one held them.

R request rows, S local shards, C columns of a block table. With budgets per head a page holds one kv head, and every head of a request is a
row of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from .entries import read_back
from .pool import PagePool


@dataclass(frozen=True, kw_only=True)
class Pages:
    """The pages of one layer on this rank, as the block tables name them."""

    pool: PagePool
    table: Tensor
    """[R, S, C] int32 page ids, -1 = no page."""
    counts: Tensor
    """[R, S] int32 entries of each table."""
    lens: Tensor
    """[R] int64, tokens of every row so far, evicted ones included."""
    rows: dict[str, Tensor] = field(default_factory=dict)
    """What the policy keeps per row, [R, ...]; with budgets per head, the query heads of this kv head only."""
    last_eviction: Tensor | int = 0
    """`time` when entries of the row were last evicted, [R, 1, 1] int64; 0 = never."""
    layer: int = 0
    """Index of the attention layer."""
    tail_rows: Tensor | None = None
    """[R, S] int64, the row of each table in pool.tail; None = the keys of open groups are not asked for."""

    @property
    def page_size(self) -> int:
        """Entries of a full page."""
        return self.pool.page_size

    @property
    def time(self) -> Tensor:
        """Queries of every row so far, [R, 1, 1] int64: a row's clock is its own, whatever other rows and padding stand beside it."""
        return self.lens.view(-1, 1, 1)

    @cached_property
    def entries(self) -> Tensor:
        """[R, S, C] int64, entries in each page; 0 where a table has no page."""
        begin = torch.arange(self.table.shape[-1], device=self.lens.device) * self.page_size
        return (self.counts.to(torch.int64).unsqueeze(-1) - begin).clamp(0, self.page_size)

    @cached_property
    def slot_positions(self) -> Tensor:
        """[R, S, C, page_size] int32, the stored positions; anything in slots without an entry."""
        return self.pool.positions[self.table.clamp_min(0)]

    @cached_property
    def last_position(self) -> Tensor:
        """[R, S, C] int32, largest position in each page; -1 where there is no page."""
        last = self.slot_positions.gather(-1, (self.entries - 1).clamp_min(0).unsqueeze(-1)).squeeze(-1)
        return torch.where(self.entries > 0, last, -1)

    @cached_property
    def filled(self) -> Tensor:
        """[R, S, C, page_size] bool: the slot holds an entry."""
        return torch.arange(self.page_size, device=self.lens.device) < self.entries.unsqueeze(-1)

    def value(self, name: str) -> Tensor:
        """The policy's number of each page, [R, S, C]; 0 where there is no page."""
        return torch.where(self.entries > 0, self.pool.counted(name, self.table), 0)

    def by_pool(self, chosen: Tensor) -> list[tuple[PagePool, Tensor]]:
        """chosen [R, S, C'] bool of the first C' columns, as its tables lie -> the pools with pages, and [R, S, C of the pool] for each."""
        return [(self.pool, fit(chosen, self.pool.table.width, False))]

    @cached_property
    def _decoded(self) -> tuple[Tensor, Tensor]:
        read = read_back(self.pool, self.table, self.counts, self.tail_rows)  # [R * S, Hkv, L, D]
        filled = self.filled[:, :, :, None, :, None]
        shape = (*self.table.shape[:2], -1, filled.shape[2], filled.shape[4])  # R, S, Hkv, C, page_size
        return tuple(torch.where(filled, x.view(*shape, x.shape[-1]).transpose(2, 3), 0) for x in read)

    @property
    def keys(self) -> Tensor:
        """[R, S, C, Hkv, page_size, Dk] f32 as attention reads them, 0 without an entry."""
        return self._decoded[0]

    @property
    def values(self) -> Tensor:
        """[R, S, C, Hkv, page_size, Dv] f32, 0 without an entry."""
        return self._decoded[1]


@dataclass(frozen=True, kw_only=True)
class JoinedPages(Pages):
    """Pages of each table in the order of their first positions, which is the order that one pool would have.

    Budgets, candidates and choices then are the same for one pool and for two. Ids in `table` belong to the page's own pool.
    """

    parts: tuple[Pages, ...]
    order: Tensor
    """[R, S, C] int64, for each column its place among the columns of all parts, one after the other."""

    @classmethod
    def of(cls, parts: list[Pages]) -> JoinedPages:
        """parts: by pool, nearest first."""
        near = parts[0]
        parts = [part for part in parts if part.pool.num_pages] or parts[:1]
        first = [torch.where(part.entries > 0, part.slot_positions[..., 0], torch.iinfo(torch.int32).max) for part in parts]
        order = torch.cat(first, -1).argsort(dim=-1, stable=True)
        return cls(
            pool=near.pool, table=torch.cat([part.table for part in parts], -1).gather(-1, order),
            counts=sum(part.counts for part in parts), lens=near.lens, rows=near.rows, last_eviction=near.last_eviction,
            layer=near.layer, parts=tuple(parts), order=order,
        )  # fmt: skip

    def by_pool(self, chosen: Tensor) -> list[tuple[PagePool, Tensor]]:
        back = torch.zeros_like(self.order, dtype=torch.bool).scatter_(-1, self.order, fit(chosen, self.order.shape[-1], False))
        columns = back.split([part.table.shape[-1] for part in self.parts], -1)
        return [(part.pool, own) for part, own in zip(self.parts, columns, strict=True)]

    def _joined(self, values: list[Tensor]) -> Tensor:
        """[R, S, C of the pool, ...] of each pool -> [R, S, C, ...]."""
        whole = torch.cat(values, 2)
        index = self.order.view(*self.order.shape, *[1] * (whole.dim() - 3))
        return whole.gather(2, index.expand(*self.order.shape, *whole.shape[3:]))

    @cached_property
    def entries(self) -> Tensor:
        return self._joined([part.entries for part in self.parts])

    @cached_property
    def slot_positions(self) -> Tensor:
        return self._joined([part.slot_positions for part in self.parts])

    def value(self, name: str) -> Tensor:
        return self._joined([part.value(name) for part in self.parts])

    @property
    def keys(self) -> Tensor:
        return self._joined([self._model(part, part.keys, "k") for part in self.parts])

    @property
    def values(self) -> Tensor:
        return self._joined([self._model(part, part.values, "v") for part in self.parts])

    def _model(self, part: Pages, x: Tensor, side: str) -> Tensor:
        """x [R, S, C, Hkv, page_size, D] of one pool as attention is given it, 0 where no entry is."""
        maps = part.pool.maps
        if maps is None or part.pool.reader.rebuilds:
            return x
        return torch.where(part.filled[:, :, :, None, :, None], maps.decode_pages(x, side), 0)


def fit(x: Tensor, columns: int, fill: float) -> Tensor:
    """Cut or pad the last dimension; columns beyond the entries of a row hold no page."""
    return torch.nn.functional.pad(x[..., :columns], (0, columns - min(x.shape[-1], columns)), value=fill)

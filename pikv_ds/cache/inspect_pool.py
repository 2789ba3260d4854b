"""The pages of one layer in one pool, as numbers. R request rows, T tables of a row, C columns of a table, P pages."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pikv_ds import ops
from pikv_ds.ops import PageFormat
from pikv_ds.pages.pool import PagePool


class Entries(NamedTuple):
    """What one table holds, in the order of its slots."""

    positions: Tensor
    """[n] int32."""
    keys: Tensor
    """[n, H, Dk] as attention meets them: of raw pages the bits that were stored, else f32."""
    values: Tensor
    """[n, H, Dv], likewise; of latent layers the first columns of the key."""


class PoolProbe:
    """Looks at one pool. Tensors are copies; `records`, `fields` and `column` are the memory itself."""

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool

    @property
    def fmt(self) -> PageFormat:
        return self.pool.fmt

    @property
    def page_size(self) -> int:
        return self.pool.page_size

    @property
    def heads(self) -> int:
        """kv heads that have tables of their own, else 1."""
        return self.pool.table.heads

    # ---- pages ---------------------------------------------------------------------------------------------------------------

    @property
    def num_pages(self) -> int:
        return self.pool.num_pages

    @property
    def free(self) -> list[int]:
        """Ids of the pages that can be taken, in the order of the stack."""
        return self.pool.allocator.free_stack[: int(self.pool.allocator.free_top)].tolist()

    @property
    def uses(self) -> Tensor:
        """[P] int64: tables that name each page, by the pool's own count."""
        return self.pool.allocator.refcount[: self.num_pages].long()

    @property
    def used_pages(self) -> int:
        return int((self.uses > 0).sum())

    @property
    def nbytes(self) -> int:
        """What the pool says it has allocated."""
        return self.pool.nbytes

    @property
    def storages(self) -> list[Tensor]:
        """What nbytes counts: records, raw tails, columns."""
        tail = None if self.pool.full_pages else self.pool.tail
        return [x for x in (self.pool.pages, tail, *self.pool.summaries.values(), *self.pool.table.counted.values()) if x is not None]

    # ---- tables --------------------------------------------------------------------------------------------------------------

    @property
    def counts(self) -> Tensor:
        """[R, T] int32 entries."""
        return self.pool.table.counts.clone()

    @property
    def num_tables(self) -> int:
        return self.pool.table.counts.shape[1]

    @property
    def page_table(self) -> Tensor:
        """[R, T, C] int32 page ids, -1 = none; the last column stays unused."""
        return self.pool.table.ids.clone()

    @property
    def parked_table(self) -> Tensor:
        """[Q, T, C'] int32 page ids of parked rows, -1 = none."""
        return self.pool.table.parked.clone()

    def page_ids(self, row: int, table: int) -> list[int]:
        count = int(self.pool.table.counts[row, table])
        return self.pool.table.ids[row, table, : -(-count // self.page_size)].tolist()

    def slots(self, row: int, table: int) -> Tensor:
        """[n] int64 page * page_size + offset of the entries, in order."""
        index = torch.arange(int(self.pool.table.counts[row, table]), device=self.pool.table.ids.device)
        return (self.pool.table.ids[row, table][index // self.page_size] * self.page_size + index % self.page_size).long()

    # ---- entries -------------------------------------------------------------------------------------------------------------

    def positions(self, row: int, table: int) -> list[int]:
        return self.pool.positions.flatten()[self.slots(row, table)].tolist()

    @property
    def held(self) -> list[list[list[int]]]:
        """[row][table] positions, in the order of their slots."""
        rows, tables = self.pool.table.counts.shape
        return [[self.positions(row, table) for table in range(tables)] for row in range(rows)]

    def pages(self, row: int) -> list[list[int]]:
        """Positions in every page of a row, table after table."""
        held = [self.positions(row, table) for table in range(self.num_tables)]
        return [own[begin : begin + self.page_size] for own in held for begin in range(0, len(own), self.page_size)]

    def entries(self, row: int, table: int) -> Entries:
        """Where pages hold coefficients of un-rotated keys, what these stand for; other coefficients stay as they are."""
        pool, slots = self.pool, self.slots(row, table)
        positions = pool.positions.flatten()[slots]
        if pool.fmt.raw and not pool.reader.rebuilds:
            page, offset = slots // pool.page_size, slots % pool.page_size
            k, v, _ = self.fields
            return Entries(positions, k[page, :, offset], v[page, :, offset])
        at = (slice(row, row + 1), slice(table, table + 1))
        ids, counts = pool.table.ids[at], pool.table.counts[at]
        if pool.reader.rebuilds:
            rows = torch.arange(pool.table.counts.numel(), device=ids.device).view_as(pool.table.counts)[at]
            k, v = pool.reader.entries(ids, counts, rows)
        else:
            tail = None if pool.full_pages or pool.tail is None else pool.tail[row * self.num_tables + table].unsqueeze(0)
            k, v = pool.decoded(ids[0], counts.flatten(), tail)
        return Entries(positions, *(x[0, :, : len(slots)].transpose(0, 1) for x in (k, v)))

    def stored(self, row: int, table: int) -> Entries:
        """As entries(), but coefficients of un-rotated keys stay what they are: codes decoded, open groups from the raw tail."""
        slots, pool = self.slots(row, table), self.pool
        tail = None if pool.full_pages or pool.tail is None else pool.tail[row * self.num_tables + table].unsqueeze(0)
        k, v = pool.decoded(pool.table.ids[row, table].unsqueeze(0), pool.table.counts[row, table].view(1), tail)
        positions = pool.positions.flatten()[slots]
        return Entries(positions, *(x[0, :, : len(slots)].transpose(0, 1) for x in (k, v)))

    @property
    def holds_unrotated(self) -> bool:
        """Pages hold coefficients of keys before their rotation."""
        return self.pool.reader.rebuilds

    # ---- memory --------------------------------------------------------------------------------------------------------------

    @property
    def records(self) -> Tensor:
        """[P, record_bytes] uint8."""
        return self.pool.pages

    @property
    def addresses(self) -> list[int]:
        """Of the tensors that a decode step reads and writes."""
        table, free = self.pool.table, self.pool.allocator
        found = (self.pool.pages, self.pool.tail, table.ids, table.counts, free.free_stack, free.free_top, free.refcount)
        return [x.data_ptr() for x in found if x is not None]

    @property
    def fields(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of a raw format: k [P, H, page_size, Dk], v [P, H, page_size, Dv], positions [P, page_size]."""
        return ops.views(self.pool.pages, self.pool.fmt)

    @property
    def tail(self) -> Tensor | None:
        """Raw keys of open groups [R * T, H, group, Dk]; None for a format without. One row in a pool of full pages."""
        return self.pool.tail

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of what is kept per page besides its entries."""
        return tuple(self.pool.summaries) + tuple(self.pool.table.counted)

    def kept(self, name: str, row: int, table: int) -> Tensor:
        """[n], of the pages of one table."""
        ids = self.page_ids(row, table)
        return self.pool.summaries[name][ids] if name in self.pool.summaries else self.pool.table.counted[name][row, table, : len(ids)]

    def column(self, name: str) -> Tensor:
        """[P, ...] of that name; a counter once rows share pages: [R, T, C]."""
        return self.pool.table.counted[name] if name in self.pool.table.counted else self.pool.summaries[name]

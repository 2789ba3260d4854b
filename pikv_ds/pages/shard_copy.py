"""The tables of one shard in one pool as tensors of their own, and a pool's tables with shards taken out and put in. Host phase.

R request rows, H heads with tables of their own (1: a page holds all), S local shards, C columns of a table, n pages. What is declared for
pages and tables (columns, counters, raw tails) is in a copy, so that whoever keeps it need not know of moves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pikv_ds import ops
from pikv_ds.exchange.digest import digest, row_digests

from .pool import PagePool

ShardCopy = dict[str, Tensor]
"""By the names of `fields`. "counts" [R, H] int32 entries; "index" [R, H, C] int32, which of the pages, -1 = none; "records" [n, bytes]."""


class Arranged(NamedTuple):
    """Tables of a pool that may take the place of its own. taken: pages that only they name."""

    counts: Tensor
    ids: Tensor
    counted: dict[str, Tensor]
    tail: Tensor | None
    taken: Tensor


def fields(pool: PagePool, columns: int, pages: int, records: int) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """What a copy of a shard consists of: name, shape and dtype, in order. records: how many of its pages come with it."""
    table, rows = pool.table, pool.table.num_rows
    found = [
        ("counts", (rows, table.heads), torch.int32),
        ("index", (rows, table.heads, columns), torch.int32),
        ("records", (records, pool.fmt.record_bytes), torch.uint8),
    ]
    found += [(f"page {name}", (pages, *x.shape[1:]), x.dtype) for name, x in sorted(pool.summaries.items())]
    found += [(f"seat {name}", (rows, table.heads, columns), x.dtype) for name, x in sorted(table.counted.items())]
    if pool.tail is not None and not pool.full_pages:
        found.append(("tail", (rows * table.heads, *pool.tail.shape[1:]), pool.tail.dtype))
    return found


def pages_of(pool: PagePool, shard: int) -> tuple[Tensor, Tensor]:
    """Of local shard `shard`: its pages [n] int64, each once, and [R, H, C] int32, which of them every table names, -1 = none.

    Sync: reads the sizes.
    """
    table = pool.table
    own = slice(shard * table.heads, (shard + 1) * table.heads)
    columns = -(-int(table.counts[:, own].max()) // pool.page_size) if table.num_rows else 0
    ids = table.ids[:, own, :columns]
    pages, index = torch.unique(ids[ids >= 0].to(torch.int64), return_inverse=True)
    return pages, torch.full_like(ids, -1).masked_scatter_(ids >= 0, index.to(torch.int32))


def copy_out(pool: PagePool, shard: int, pages: Tensor, index: Tensor) -> ShardCopy:
    """pages, index: of `pages_of`."""
    table, heads, columns = pool.table, pool.table.heads, index.shape[-1]
    own = slice(shard * heads, (shard + 1) * heads)
    copy = {"counts": table.counts[:, own].contiguous(), "index": index, "records": pool.pages.index_select(0, pages)}
    copy |= {f"page {name}": x.index_select(0, pages) for name, x in pool.summaries.items()}
    copy |= {f"seat {name}": x[:, own, :columns].contiguous() for name, x in table.counted.items()}
    if pool.tail is not None and not pool.full_pages:
        by_table = pool.tail.view(table.num_rows, table.tables_per_row, *pool.tail.shape[1:])
        copy["tail"] = by_table[:, own].flatten(0, 1).contiguous()
    return copy


def checksum(copy: ShardCopy) -> int:
    """Of everything in it; equal copies have equal ones on every rank."""
    return digest([row_digests(x) if name == "records" else x for name, x in sorted(copy.items())])


def copy_in(pool: PagePool, copy: ShardCopy) -> Tensor:
    """Store the pages of a copy; no table of the pool names them yet. Returns: [n] int32 their ids."""
    uses = torch.bincount(copy["index"][copy["index"] >= 0].flatten().to(torch.int64), minlength=len(copy["records"]))
    ids = pool.take(len(copy["records"]), uses)
    if len(ids):
        ops.migrate(pool.pages, copy["records"], ids, torch.arange(len(ids), dtype=torch.int32, device=pool.device))
    for name, x in pool.summaries.items():
        x[ids.long()] = copy[f"page {name}"]
    return ids


def read_back(pool: PagePool, copy: ShardCopy, ids: Tensor) -> ShardCopy:
    """A copy that was stored, its pages as the pool has them now."""
    stored = {f"page {name}": x[ids.long()] for name, x in pool.summaries.items()}
    return copy | stored | {"records": pool.pages.index_select(0, ids.long())}


def arrange(pool: PagePool, stay: Mapping[int, int], arrive: Mapping[int, tuple[ShardCopy, Tensor]], shards: int) -> Arranged:
    """Tables of so many local shards: i is the one that is stay[i] now, or that of arrive[i], a copy and the ids of its pages.

    Nothing of the pool changes.
    """
    table, heads = pool.table, pool.table.heads
    tables = shards * heads
    widths = [copy["index"].shape[-1] + 1 for copy, _ in arrive.values()]
    width = max([table.width, *widths])
    ids = table.ids.new_full((table.num_rows, tables, width), -1)
    counts = table.counts.new_zeros(table.num_rows, tables)
    counted = {name: x.new_zeros(ids.shape) for name, x in table.counted.items()}
    own_tail = pool.tail is not None and not pool.full_pages
    tail = pool.tail.new_empty(table.num_rows * tables, *pool.tail.shape[1:]) if own_tail else pool.tail
    by_table = tail.view(table.num_rows, tables, *tail.shape[1:]) if own_tail else None
    old_tail = pool.tail.view(table.num_rows, table.tables_per_row, *tail.shape[1:]) if own_tail else None
    for at, before in stay.items():
        new, old = slice(at * heads, (at + 1) * heads), slice(before * heads, (before + 1) * heads)
        counts[:, new], ids[:, new, : table.width] = table.counts[:, old], table.ids[:, old]
        for name, x in counted.items():
            x[:, new, : table.width] = table.counted[name][:, old]
        if by_table is not None:
            by_table[:, new] = old_tail[:, old]
    for at, (copy, pages) in arrive.items():
        new, index = slice(at * heads, (at + 1) * heads), copy["index"]
        columns = index.shape[-1]
        counts[:, new] = copy["counts"]
        if columns and len(pages):
            ids[:, new, :columns] = torch.where(index >= 0, pages[index.clamp_min(0).long()], -1)
        for name, x in counted.items():
            x[:, new, :columns] = copy[f"seat {name}"]
        if by_table is not None:
            by_table[:, new] = copy["tail"].view(table.num_rows, heads, *tail.shape[1:])
    taken = torch.cat([pages for _, pages in arrive.values()]) if arrive else table.ids.new_zeros(0)
    return Arranged(counts, ids, counted, tail, taken)


def install(pool: PagePool, arranged: Arranged, counts: Tensor) -> None:
    """These tables from now on; counts: the view that a rank reads once per step, which has their counts. Pages that left are free."""
    table = pool.table
    table.ids, table.counts, table.counted, pool.tail = arranged.ids, counts, arranged.counted, arranged.tail
    pool.allocator.recount(table.ids[table.ids >= 0])


def give_back(pool: PagePool) -> None:
    """Pages that were stored and that no table names are free again."""
    pool.allocator.recount(pool.table.ids[pool.table.ids >= 0])

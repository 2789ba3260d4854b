"""One move of shards: what leaves a rank as bytes, what has come as tables beside the present ones, and the change from these to those.

Nothing of a cache changes before all ranks have said that they hold what was sent, by the same checksum of every shard. L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pikv_ds.exchange.digest import digest, row_digests
from pikv_ds.pages.layers import RankPages
from pikv_ds.pages.shard_copy import Arranged, ShardCopy, arrange, checksum, copy_in, copy_out, fields, give_back, pages_of, read_back
from pikv_ds.placement.shard_map import ShardMap

from .ahead import Arrivals, Ledger, Place
from .moves import Move
from .wire import Unpacked, packed


class Leaving(NamedTuple):
    """blocks: uint8 for each rank. sums: by shard. ahead: bytes of pages that need not be sent, as they were copied ahead."""

    blocks: list[Tensor]
    sums: dict[int, int]
    ahead: int


class Prepared(NamedTuple):
    """Tables [layer][level] that may take the place of the present ones, and the checksums of what they hold that is new."""

    map: ShardMap
    tables: list[list[Arranged]]
    counts: list[Tensor]
    sums: dict[int, int]


def leaving(pages: RankPages, moves: Sequence[Move], ledger: Ledger) -> Leaving:
    """What this rank sends."""
    parts: list[list[Tensor]] = [[] for _ in range(pages.map.num_ranks)]
    sums: dict[int, int] = {}
    ahead = 0
    for move in moves:
        if move.source != pages.map.rank:
            continue
        own: list[int] = []
        for layer in pages.layers:
            for level, pool in enumerate(layer.pools):
                ids, index = pages_of(pool, pages.map.local.index(move.shard))
                copy = copy_out(pool, pages.map.local.index(move.shard), ids, index)
                own.append(checksum(copy))
                slots = ledger.find(Place(move.target, layer.index, level), row_digests(copy["records"]))
                late = slots < 0
                ahead += int((slots >= 0).sum()) * pool.fmt.record_bytes
                copy["records"] = copy["records"][late]
                sizes = torch.tensor([index.shape[-1], len(ids), int(late.sum())], dtype=torch.int64, device=pages.device)
                named = fields(pool, index.shape[-1], len(ids), len(copy["records"]))
                parts[move.target] += [sizes, slots, *(copy[name] for name, _, _ in named)]
        sums[move.shard] = _sum(own)
    return Leaving([packed(of_rank, pages.device) for of_rank in parts], sums, ahead)


def arrived(pages: RankPages, moves: Sequence[Move], blocks: Sequence[Tensor], arrivals: Arrivals) -> dict[tuple[int, int, int], ShardCopy]:
    """By (layer, level, shard), what has come. Raises: ValueError where it is not what was to come."""
    found: dict[tuple[int, int, int], ShardCopy] = {}
    for source, block in enumerate(blocks):
        read = Unpacked(block)
        for move in moves:
            if (move.source, move.target) != (source, pages.map.rank):
                continue
            for layer in pages.layers:
                for level, pool in enumerate(layer.pools):
                    columns, count, late = read.take((3,), torch.int64).tolist()
                    slots = read.take((count,), torch.int64)
                    copy = {name: read.take(shape, dtype) for name, shape, dtype in fields(pool, columns, count, late)}
                    copy["records"] = arrivals.whole(Place(source, layer.index, level), slots, copy["records"])
                    found[layer.index, level, move.shard] = copy
        read.end()
    return found


def prepare(pages: RankPages, wanted: ShardMap, copies: dict[tuple[int, int, int], ShardCopy]) -> Prepared:
    """Store what has come, in pages that no table names, and make the tables that name it."""
    stay = {at: pages.map.local.index(shard) for at, shard in enumerate(wanted.local) if shard in pages.map.local}
    come = {at: shard for at, shard in enumerate(wanted.local) if shard not in pages.map.local}
    sums: dict[int, list[int]] = {shard: [] for shard in come.values()}
    tables: list[list[Arranged]] = []
    for layer in pages.layers:
        tables.append([])
        for level, pool in enumerate(layer.pools):
            arrive: dict[int, tuple[ShardCopy, Tensor]] = {}
            for at, shard in come.items():
                copy = copies[layer.index, level, shard]
                ids = copy_in(pool, copy)
                sums[shard].append(checksum(read_back(pool, copy, ids)))
                arrive[at] = copy, ids
            tables[-1].append(arrange(pool, stay, arrive, wanted.num_local))
    return Prepared(
        wanted, tables, pages.new_counts(pages.rows.num_rows, wanted.num_local), {shard: _sum(own) for shard, own in sums.items()}
    )


def commit(pages: RankPages, prepared: Prepared) -> None:
    """The new tables take the place of the present ones; pages of shards that left are free. Can be done again where it broke off."""
    pages.rehome(prepared.map, prepared.tables, prepared.counts)


def roll_back(pages: RankPages) -> None:
    """What was stored of shards that did not come is given back; the tables are as they were."""
    for pool in pages.all_pools:
        give_back(pool)
    pages.room.quiet = 0
    pages.room.shrink()


def _sum(parts: list[int]) -> int:
    return digest([torch.tensor(parts, dtype=torch.int64)])

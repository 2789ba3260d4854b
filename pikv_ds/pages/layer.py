"""The pages of one layer on this rank: its pools, nearest first, and who is told of changes. R rows, S tables of a row, C columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from pikv_ds.codecs.request_maps import PageMaps
from pikv_ds.ops import PageFormat
from pikv_ds.placement.shard_map import ShardMap

from .addresses import Addresses
from .capped import CappedReader
from .events import NewEntries, PageChange, PageEvents, Rebased
from .far import LayerTier
from .move import Moved, demote, entries_of, page_slots
from .plan import LayerPlan, PoolPlan
from .pool import PagePool
from .raw import RawReader
from .rebase import rebase
from .rows import RowChange
from .tiered import TieredPool
from .unrotated import UnrotatedReader


class LayerPages:
    """Owns the pools of a layer, which a new generation replaces. Entries are appended to the first; pages move on to the next.

    Pools differ by their place and by whether every query reads them (plan.pools); nothing else tells them apart.
    """

    def __init__(
        self,
        index: int,
        plan: LayerPlan,
        heads: int,
        dtype: torch.dtype,
        shard_map: ShardMap,
        maps: PageMaps | None,
        addresses: Addresses | None = None,
        tier: LayerTier | None = None,
    ) -> None:
        """maps: of the pools whose entries are mapped; None: the same numbers. addresses: as for PagePool. tier: of the nearest pool; None:
        all its pages lie in its own memory."""
        self._addresses, self._tier = addresses, tier
        self.index, self.plan, self.spec, self.heads, self.dtype, self.map = index, plan, plan.spec, heads, dtype, shard_map
        self.maps, self.entry_maps = maps, plan.entry_maps
        self.events = PageEvents()
        self.pools: tuple[PagePool, ...] = ()
        self.routed: PagePool | None = None
        """The pool that a router chooses from; None: every query reads all."""

    @property
    def nearest(self) -> PagePool:
        """The pool that entries are appended to."""
        return self.pools[0]

    def start(self, counts: Sequence[Tensor], free_tops: Sequence[Tensor], no_tails: Mapping[PageFormat, Tensor]) -> None:
        """Empty pools; earlier pages are given back.

        Args: per pool counts [R, S] int32 and a 0-d int64, views to keep. no_tails: of pools that are given full pages in a grouped format.
        """
        for pool in self.pools:
            pool.retire()
        sizes = zip(self.plan.pools, counts, free_tops, strict=True)
        self.pools = tuple(self._pool(level, plan, *own, no_tails.get(plan.fmt)) for level, (plan, *own) in enumerate(sizes))
        self.routed = None if self.plan.routed is None else self.pools[self.plan.routed]
        for pool in self.pools:
            for name, dtype in self.plan.columns.items():
                pool.add_counter(name, dtype)

    def _pool(self, level: int, plan: PoolPlan, counts: Tensor, free_top: Tensor, no_tail: Tensor | None) -> PagePool:
        unrotated, alone = self.plan.unrotated, len(self.plan.pools) == 1
        reader = RawReader if unrotated is None or not (level or alone) else partial(UnrotatedReader, maps=unrotated)
        if self.spec.softcap is not None:
            reader = partial(CappedReader, softcap=self.spec.softcap)
        kind = PagePool if level or self._tier is None else partial(TieredPool, tier=self._tier)
        return kind(
            plan.fmt, self.dtype, counts, free_top, reader, heads=self.heads, level=level, maps=self.maps if plan.mapped else None,
            full_pages=level > 0, no_tail=no_tail, events=self.events, addresses=self._addresses,
            block_size=plan.block_size,
        )  # fmt: skip

    # ---- host phase ----------------------------------------------------------------------------------------------------------

    def move(self, level: int, gone: Tensor) -> Moved | None:
        """Full pages gone [R, S, C] bool of a pool go to the next one, and who rebuilds what it keeps of pages is told."""
        target = self.pools[level + 1]
        moved = demote(self.pools[level], target, gone)
        if moved is not None:
            self._rebuilt(level + 1, None, partial(self._moved, target, moved))
        return moved

    def rebase(self, level: int, rows: Tensor, by_k: Tensor, by_v: Tensor) -> None:
        """Entries of rows [n] int64 in a pool get another basis: x -> x by, by [n, H, r, r] f32. What they are multiplied by is given."""
        rebase(self.pools[level], rows, by_k, by_v)
        self._rebuilt(level, Rebased(rows, by_k), partial(self.stored, level, rows))

    def _rebuilt(self, level: int, basis: Rebased | None, read: Callable[[], NewEntries]) -> None:
        change = PageChange(layer=self.index, level=level, basis=basis, read=read)
        for tell in self.events.rebuilt:
            tell(change)

    def kept(self, change: RowChange, cut: Tensor) -> list[Tensor]:
        """Per pool [R', S] int32 entries that rows keep. cut [R', S]: cropped, which never reaches behind the nearest pool."""
        own = [change.tensor(pool.table.counts) for pool in self.pools]
        return [own[0] - cut, *own[1:]]

    def _moved(self, pool: PagePool, moved: Moved) -> NewEntries:
        """The entries of pages that have come into a pool, keys as they are read from now on."""
        slots, k, positions = (
            page_slots(moved.target, pool.page_size),
            entries_of(pool, moved.target)[0],
            pool.positions[moved.target].flatten(),
        )
        rows, tables = (x.repeat_interleave(pool.page_size) for x in (moved.rows, moved.tables))
        return NewEntries(
            k=pool.reader.met(k, positions), rows=rows, positions=positions, shard=self.map.shards[tables],
            valid=torch.ones_like(slots, dtype=torch.bool), slot_mapping=slots, table=torch.zeros_like(slots),
        )  # fmt: skip

    def stored(self, level: int, rows: Tensor) -> NewEntries:
        """All entries of some rows [n] in one pool, table after table, keys as they are read. One table per shard. Host phase."""
        pool, num_tables = self.pools[level], self.map.num_local
        counts = pool.table.counts[rows].flatten()
        held = torch.arange(int(counts.max()), device=counts.device) < counts.unsqueeze(-1)
        cell, index = torch.nonzero(held, as_tuple=True)
        table = rows[cell // num_tables] * num_tables + cell % num_tables
        page = pool.table.ids.flatten(0, 1)[table, index // pool.page_size].to(torch.int64)
        offset = index % pool.page_size
        k, positions = _keys_at(pool, table, index), pool.positions[page, offset]
        return NewEntries(
            k=pool.reader.met(k, positions), rows=table // num_tables, positions=positions, shard=self.map.shards[table % num_tables],
            valid=torch.ones_like(page, dtype=torch.bool), slot_mapping=(page * pool.page_size + offset).to(torch.int32),
            table=table.to(torch.int32),
        )  # fmt: skip


def _keys_at(pool: PagePool, table: Tensor, index: Tensor) -> Tensor:
    """[n, H, Dk] f32, as pages hold them: keys of the entries `index` [n] of tables [n] (row * tables of a row + table, ascending)."""
    tables, of = torch.unique_consecutive(table, return_inverse=True)
    tail = None if pool.tail is None else pool.tail[tables]
    k, _ = pool.decoded(pool.table.ids.flatten(0, 1)[tables], pool.table.counts.reshape(-1)[tables], tail)
    return k[of, :, index]

"""All layers' pages on one rank, and their host phase: allocate, fork, move, expire. R rows, S local shards, L layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pikv_ds.codecs.request_maps import PageMaps
from pikv_ds.config.storage import StorageConfig
from pikv_ds.placement.directory import Directory
from pikv_ds.placement.shard_map import ShardMap
from pikv_ds.staging import Arriving, sent
from pikv_ds.step.step import Step

from .addresses import Addresses
from .counters import Counters
from .crops import CropLimits
from .far import LayerTier
from .layer import LayerPages
from .mirror import Mirror
from .parked import ParkedRows
from .plan import PagesPlan
from .pool import PagePool, no_tail
from .recycle import expire, fork
from .room import Room
from .rows import RowChange, Rows
from .shard_copy import Arranged, install


class RankPages:
    """Owns the layers, the row counts and the directory. Everything here runs between forwards, never below attend."""

    def __init__(
        self,
        plan: PagesPlan,
        storage: StorageConfig,
        shard_map: ShardMap,
        num_experts: int,
        device: torch.device,
        request_maps: Mapping[int, PageMaps],
        tiers: Mapping[int, LayerTier] | None = None,
    ) -> None:
        """plan: its maps lie on the device. request_maps: by layer, of pools whose maps belong to requests (tiers/bases.py).
        tiers: by layer, of pools whose pages do not all lie in their own memory (tiers/offload.py)."""
        self.plan, self.storage, self.page_size, self.heads = plan, storage, plan.page_size, plan.heads
        self.dtype, self.device, self.map = plan.dtype, device, shard_map
        self.num_shards = shard_map.num_shards
        self.addresses = Addresses()
        self.layers = [
            LayerPages(
                i, layer, plan.heads, plan.dtype, shard_map, layer.transform or request_maps.get(i), self.addresses, (tiers or {}).get(i)
            )
            for i, layer in enumerate(plan.layers)
        ]
        self.specs = [layer.spec for layer in plan.layers]
        self.num_levels = max(len(layer.pools) for layer in plan.layers)
        self.windowed = [layer for layer in self.layers if layer.spec.window is not None]
        self.directory = Directory(self.specs, self.num_shards, device, self.heads, self.addresses.moved)
        self.counters = Counters(num_experts, device)
        self.rows = Rows(device)
        self.crops = CropLimits(self.specs, self.rows)
        self.rehomed: tuple[Callable[[], None], ...] = ()  # told when this rank holds other shards: who knows sizes of its tables
        self.parked = ParkedRows(self)
        self.room = Room(self)
        self.allocate(0)

    def allocate(self, num_rows: int) -> None:
        """Start with empty tables of `num_rows` requests and zeroed entry counters; earlier pages are given back."""
        self.addresses.moved()
        self.counts = self.new_counts(num_rows)
        self.free_tops = [torch.zeros(len(self.layers), dtype=torch.int64, device=self.device) for _ in range(self.num_levels)]
        behind = {pool.fmt for plan in self.plan.layers for pool in plan.pools[1:] if pool.fmt.grouped}
        self.no_tails = {fmt: no_tail(fmt, self.dtype, self.device) for fmt in behind}
        for i, layer in enumerate(self.layers):
            levels = range(len(layer.plan.pools))
            layer.start([self.counts[level][i] for level in levels], [self.free_tops[level][i] for level in levels], self.no_tails)
        self.room.start()
        self.rows.start(num_rows)
        self.parked.clear()
        self.directory.reset(num_rows)
        self.evicted = [[[0] * self.heads for _ in range(num_rows)] for _ in self.layers]  # [L][R][H], as evicted_by_head says it
        self.counters.clear()
        self._forget_leaves(num_rows)
        self.mirror()

    def _forget_leaves(self, num_rows: int) -> None:
        """Other rows: it is not known yet when their pages leave windows."""
        self._leaves: list[int] = [0] * num_rows
        self._leaving: Arriving | None = None

    @property
    def leaves(self) -> list[int]:
        """[R] tokens of a row before which no page of it leaves a window. Sync: waits for the last forward in which some did."""
        if self._leaving is not None:
            self._leaves, self._leaving = self._leaving.values[0].tolist(), None
        return self._leaves

    @property
    def num_local(self) -> int:
        """Shards of this rank, copies among them."""
        return self.map.num_local

    def new_counts(self, num_rows: int, num_local: int | None = None) -> list[Tensor]:
        """By level [L, R, S * H] int32: level 0 is read once per step, in one piece. num_local: S, default as now."""
        shape = (len(self.layers), num_rows, (num_local or self.num_local) * self.heads)
        return [torch.zeros(shape, dtype=torch.int32, device=self.device) for _ in range(self.num_levels)]

    @property
    def all_pools(self) -> list[PagePool]:
        return [pool for layer in self.layers for pool in layer.pools]

    @property
    def entries_live(self) -> Tensor:
        """0-d int64, entries in all tables of this rank, those of parked rows too. Sync: none."""
        return sum(counts.sum() for counts in self.counts) + self.parked.entries

    @property
    def metadata_nbytes(self) -> int:
        """Bytes of what says where entries lie, and of their counters."""
        own = sum(x.nbytes for x in (*self.counts, *self.free_tops)) + sum(pool.metadata_nbytes for pool in self.all_pools)
        own += sum(tail.nbytes for tail in self.no_tails.values()) + self.parked.metadata_nbytes
        return own + self.directory.nbytes + self.counters.nbytes + self.rows.nbytes

    def mirror(self) -> None:
        """Ask for the sizes that plan the next forward. Sync: none; who looks at them waits."""
        self.sizes = Mirror(self.counts[0], self.free_tops, self.directory.load, self.counters.device_counts)

    def change(self, change: RowChange) -> None:
        """Rows are forked, cropped, dropped or new, with all that is kept of them, after Rows.check; `settle_rows` comes after it."""
        self.room.let_go()
        self.addresses.moved()
        parent = change.index
        keep, lens = (sent(x, torch.int64, self.device) for x in (change.keep, change.lens))
        removed = self.directory.fork(parent, keep, lens)
        self.counts, old = self.new_counts(parent.numel()), self.counts
        childless = torch.ones(old[0].shape[1], dtype=torch.bool, device=self.device)
        childless[parent[parent >= 0]] = False
        some_end = bool((parent < 0).any())  # rows of another generation leave; among forks, dropped rows count as forked away
        for i, layer in enumerate(self.layers):
            cut = self.map.own(removed[i], 1).repeat_interleave(self.heads, 1)
            for level, (pool, kept) in enumerate(zip(layer.pools, layer.kept(change, cut), strict=True)):
                self.counts[level][i] = kept
                fork(pool, parent, self.counts[level][i])
                gone = int(old[level][i][childless].sum()) if some_end else 0
                gone += int(cut.sum()) if level == 0 else 0
                self.counters.cropped += gone
                self.counters.forked += int(self.counts[level][i].sum()) + gone - int(old[level][i].sum())
        self.rows.change(change)

    def settle_rows(self) -> None:
        """Rows have changed, and parked ones are apart again (parked.joined)."""
        self.evicted = self.directory.evicted_by_head()
        self._forget_leaves(self.rows.num_rows)
        self.mirror()

    def rehome(self, shard_map: ShardMap, arranged: Sequence[Sequence[Arranged]], counts: list[Tensor]) -> None:
        """This rank holds the shards that the map says, in tables [layer][level]. counts: of `new_counts`. Can be done again; `shrink`
        comes after it."""
        self.addresses.moved()
        if self.map.copied or shard_map.copied:
            new = sum(int(tables.counts.sum()) for of_layer in arranged for tables in of_layer)
            self.counters.copied += new - sum(int(pool.table.counts.sum()) for pool in self.all_pools)
        self.map = shard_map
        for i, (layer, of_layer) in enumerate(zip(self.layers, arranged, strict=True)):
            layer.map = shard_map
            for level, (pool, tables) in enumerate(zip(layer.pools, of_layer, strict=True)):
                counts[level][i] = tables.counts
                install(pool, tables, counts[level][i])
        self.counts, self.room.quiet = counts, 0
        self._forget_leaves(self.rows.num_rows)
        for tell in self.rehomed:
            tell()
        self.mirror()

    def note_eviction(self, lens: list[int]) -> None:
        """Rows of these lengths have just lost entries to their budget."""
        evicted = self.directory.evicted_by_head()
        lost = [any(old[row] != new[row] for old, new in zip(self.evicted, evicted, strict=True)) for row in range(len(lens))]
        self.evicted = evicted
        self.crops.note_eviction(lens, lost)

    def expire(self, step: Step) -> bool:
        """Free pages that have left their layer's window, but for what may still be cropped back. Returns whether entries may have left.

        Sync: none in a decode step, but for sizes that were asked for after an earlier one.
        """
        lens, margin = step.lens_after_host, step.margin
        if margin is None or not lens or not self.windowed:
            return False
        self.crops.note_expiry(lens, margin)
        if all(n - margin < leaves for n, leaves in zip(lens, self.leaves, strict=True)):
            return False
        at, after = sent([n - margin for n in lens], torch.int64, self.device), sent(lens, torch.int64, self.device)
        expired, leaves = zip(*(expire(layer.nearest, at, after, layer.spec.window) for layer in self.windowed), strict=True)
        total = torch.stack(expired).sum()
        self.counters.expire(total)
        self._leaving = Arriving(torch.stack(leaves).amin(0))
        if self._leaving.on_host:
            self._leaves, self._leaving = self._leaving.values[0].tolist(), None
            return bool(total)
        return True

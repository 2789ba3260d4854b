"""All layers' pages on one rank, and their host phase: allocate, fork, reserve, expire, shrink. R rows, S local shards, L layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
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
from .layer import LayerPages
from .mirror import Mirror
from .parked import ParkedRows
from .plan import PagesPlan
from .pool import PagePool, no_tail
from .recycle import expire, fork
from .rows import RowChange, Rows
from .shard_copy import Arranged, install
from .sizing import held_pages, pages_to_open, shard_capacity


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
    ) -> None:
        """plan: its maps lie on the device. request_maps: by layer, of pools whose maps belong to requests (tiers/bases.py)."""
        self.plan, self.storage, self.page_size, self.heads = plan, storage, plan.page_size, plan.heads
        self.dtype, self.device, self.map = plan.dtype, device, shard_map
        self.num_shards, self.num_local = shard_map.num_shards, shard_map.num_local
        self.addresses = Addresses()
        self.layers = [
            LayerPages(i, layer, plan.heads, plan.dtype, shard_map, layer.transform or request_maps.get(i), self.addresses)
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
        self.allocate(0)

    def allocate(self, num_rows: int) -> None:
        """Start with empty tables of `num_rows` requests and zeroed entry counters; earlier pages are given back."""
        self.addresses.moved()
        self.held: int | None = None
        """Tokens up to which every row may grow before a tensor is replaced (hold); None: nothing is held for them."""
        self.counts = self.new_counts(num_rows)
        self.free_tops = [torch.zeros(len(self.layers), dtype=torch.int64, device=self.device) for _ in range(self.num_levels)]
        behind = {pool.fmt for plan in self.plan.layers for pool in plan.pools[1:] if pool.fmt.grouped}
        self.no_tails = {fmt: no_tail(fmt, self.dtype, self.device) for fmt in behind}
        for i, layer in enumerate(self.layers):
            levels = range(len(layer.plan.pools))
            layer.start([self.counts[level][i] for level in levels], [self.free_tops[level][i] for level in levels], self.no_tails)
        self.quiet = 0  # decode steps that surely open no page: nothing to reserve, mirror or give back
        self.gives_back = False  # sizes are on their way, by which pools with much free space shrink
        self.unchecked: list[int] | None = None  # capacities of a forward of which it is not known yet whether all entries fitted
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

    def new_counts(self, num_rows: int) -> list[Tensor]:
        """By level [L, R, S * H] int32: level 0 is read once per step, in one piece."""
        shape = (len(self.layers), num_rows, self.num_local * self.heads)
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
        self.let_go()
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
        self.map = shard_map
        for i, (layer, of_layer) in enumerate(zip(self.layers, arranged, strict=True)):
            layer.map = shard_map
            for level, (pool, tables) in enumerate(zip(layer.pools, of_layer, strict=True)):
                counts[level][i] = tables.counts
                install(pool, tables, counts[level][i])
        self.counts, self.quiet = counts, 0
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

    def hold(self, tokens: int) -> None:
        """Make room for rows of up to `tokens` tokens, whichever shards they go to. Until rows change, or one grows longer, decode steps
        replace no tensor of the pages and ask for no sizes. Sync: waits for the sizes.

        Raises: CapacityError where storage.capacity_tokens does not allow so many.
        """
        lens = [tokens] * self.counts[0].shape[1]
        self.mirror()
        free = self.sizes.free(0)
        for i, (layer, capacity) in enumerate(zip(self.layers, self._capacities(lens), strict=True)):
            needed, columns = held_pages(
                layer.spec, tokens, rows=len(lens), shards=self.num_local, heads=self.heads, page_size=self.page_size, capacity=capacity
            )
            pool = layer.nearest
            added = pool.reserve(int(free[i]), needed - (pool.num_pages - int(free[i])), columns)
            if added and not self.sizes.on_host:
                free[i] += added
            pool.stays = True
        if self.num_shards > 1:
            self.directory.reserve(tokens)
        self.counters.keep_nothing()
        self.held = tokens

    def let_go(self) -> None:
        """Nothing is held for rows that grow; what is free is given back as after any step."""
        self.held, self.quiet = None, 0
        for layer in self.layers:
            layer.nearest.stays = False

    def _is_held(self, step: Step) -> bool:
        """Whether all that a step may need is there. If so its sizes are filled in, else those of the pages are asked for."""
        assert self.held is not None, "asked where something is held"
        if max(step.lens_after_host, default=0) > self.held:
            self.let_go()
        elif step.decode and not step.hold:  # an announced crop keeps what a window drops
            step.held, step.may_open, step.may_spill = True, [True] * len(self.layers), [self.num_shards > 1] * len(self.layers)
            step.capacity = self._capacities(step.lens_after_host)
            return True
        self.mirror()
        return False

    def _capacities(self, lens: list[int]) -> list[int]:
        """[L] entries that a shard of each layer may hold when its rows have `lens` tokens. Raises: CapacityError."""
        kinds = [(spec.window, sum(map(sum, evicted)) // self.heads) for spec, evicted in zip(self.specs, self.evicted, strict=True)]
        capacity = {
            kind: shard_capacity(self.specs, kind[0], lens, self.num_shards, self.page_size, self.storage.capacity_tokens, kind[1])
            for kind in set(kinds)
        }
        return [capacity[kind] for kind in kinds]

    def reserve(self, step: Step) -> None:
        """Fill in the per-layer sizes of a step and make sure that its entries will find pages, without knowing their shards yet."""
        if self.held is not None and self._is_held(step):
            return
        if step.decode and self.quiet:
            self.quiet -= 1
            step.quiet, step.may_open, step.may_spill = True, [False] * len(self.layers), [False] * len(self.layers)
            return
        if self.gives_back:
            self._give_back()
        page = self.page_size
        num_new, counts = np.array(step.num_new, dtype=np.int64), self.sizes.counts.numpy()  # numpy: small sizes, each step
        most_new, total_new = max(step.num_new, default=0), sum(step.num_new)
        fullest = counts.max((1, 2), initial=0).tolist()
        opens = [0] * len(self.layers)
        if step.decode:
            # A row opens a page only when an open page is full; its token may go to any shard, and there to the tables of all heads.
            full = (counts % page == 0).reshape(*counts.shape[:2], self.num_local, self.heads).sum(-1).max(-1, initial=0)
            opens = (full * (num_new > 0)).sum(1).tolist()
        if self.num_shards == 1 and self.storage.capacity_tokens is None:
            # What every open page has left after this step; a row without a token in it opens none. With several shards spilling is
            # decided anew in each step.
            opens_later = (counts % page == 0) & (num_new == 0)[:, None]
            self.quiet = int(np.where(opens_later, 0, page - 1 - counts % page).min(initial=page - 1)) if step.decode else 0
        step.capacity = self._capacities(step.lens_after_host)
        free = self.sizes.free(0).tolist()
        fullest_shard = self._tokens(self.sizes.load).amax(1).tolist() if self.num_shards > 1 else [0] * len(self.layers)
        for i, layer in enumerate(self.layers):
            step.may_spill.append(self.num_shards > 1 and fullest_shard[i] + total_new > step.capacity[i])
            needed = opens[i] if step.decode else self._pages_for_chunk(i, torch.from_numpy(num_new), step.capacity[i], step.hold)
            step.may_open.append(needed > 0)
            added = layer.nearest.reserve(free[i], needed, -(-(fullest[i] + most_new) // page))
            if added and not self.sizes.on_host:
                self.sizes.free(0)[i] += added
        if self.num_shards > 1:
            self.directory.reserve(max(step.lens_after_host, default=0))

    def _pages_for_chunk(self, layer: int, num_new: Tensor, capacity: int, hold: bool) -> int:
        window = self.specs[layer].window
        stored = num_new if window is None or hold else num_new.clamp_max(window - 1)
        room = capacity - self._tokens(self.map.own(self.sizes.load[layer], 0)) if self.num_shards > 1 and window is None else None
        counts = self.sizes.counts[layer].view(-1, self.num_local, self.heads)
        if self.heads == 1:
            return pages_to_open(counts.squeeze(-1), stored, room, self.page_size)
        room = None if room is None else room + 1  # loads of heads are rounded up to tokens: a shard may end one above its capacity
        return sum(pages_to_open(counts[..., head], stored, room, self.page_size) for head in range(self.heads))

    def _tokens(self, load: Tensor) -> Tensor:
        """Entries of tables per head as tokens, rounded up."""
        return -(-load // self.heads)

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

    def settle(self, step: Step, *, left: bool, refuses_spills: bool) -> None:
        """After a forward: give back slabs of pools with much free space, and say what did not fit.

        left: entries have left. refuses_spills: storage.overflow is "error". A decode step does not wait for the sizes that this takes, as
        long as they are on their way from a device: then both happen at the start of the next forward that may open a page.

        Raises: CapacityError, on all ranks alike.
        """
        if step.held:  # nobody asks how much is free
            if refuses_spills:
                self.mirror()
                self._check_later(step)
            return
        known = self.sizes.on_host
        if not known and step.decode and not left and self.num_shards == 1:
            self.sizes.follow(torch.tensor(step.num_new), self.page_size)
            known = True
        if left or not step.quiet:
            if not known:
                self.mirror()
            self.gives_back = True
            if known or not step.decode:
                self._give_back()
        if refuses_spills:
            self._check_later(step)

    def _check_later(self, step: Step) -> None:
        """At the start of the next forward; where there is nobody to wait for, now."""
        self.unchecked = step.capacity
        if self.sizes.on_host:
            self.check_last()

    def shrink(self) -> None:
        """Give back slabs of pools with much free space, now. Sync: waits for the sizes."""
        self.mirror()
        self._give_back()

    def _give_back(self) -> None:
        self.gives_back, free = False, self.sizes.free
        for i, layer in enumerate(self.layers):
            for level, pool in enumerate(layer.pools):
                free(level)[i] = pool.shrink(int(free(level)[i]))

    def check_last(self) -> None:
        """Whether all entries of the last forward fitted, if that is not known yet. Raises: CapacityError, on all ranks alike."""
        if self.unchecked is not None:
            capacity, self.unchecked = self.unchecked, None
            self.counters.raise_if_overflowed(self.sizes.spilled, capacity)

"""All layers' storage on one rank, and its host phase: allocate, fork, reserve, expire, shrink. R rows, S local shards, L layers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pikv_ds.codecs.request_maps import PageMaps
from pikv_ds.config.storage import StorageConfig
from pikv_ds.ops import PageFormat
from pikv_ds.placement.directory import Directory
from pikv_ds.placement.shard_map import ShardMap
from pikv_ds.step.step import StepPlan

from .counters import Counters
from .crops import CropLimits
from .plan import PagesPlan
from .pool import LayerStore, tail_dtype
from .recycle import expire, fork
from .rows import RowChange, Rows
from .sizing import pages_to_open, shard_capacity


class Tables:
    """Owns the stores, the row counts and the directory. Everything here runs between forwards, never below attend."""

    def __init__(
        self,
        plan: PagesPlan,
        storage: StorageConfig,
        shard_map: ShardMap,
        num_experts: int,
        device: torch.device,
    ) -> None:
        """plan: its maps lie on the device."""
        self.layers = layers = [layer.spec for layer in plan.layers]
        self.storage, self.page_size, self.heads = storage, plan.page_size, plan.heads
        self.formats, self.far_formats = [layer.near for layer in plan.layers], [layer.far for layer in plan.layers]
        self.two_pools = any(layer.far is not None for layer in plan.layers)
        # From near entries to what far pages hold; None: the same, or bases of requests that are not fitted yet.
        self.far_maps: list[PageMaps | None] = [layer.far_maps for layer in plan.layers]
        self.undone = [layer.undone for layer in plan.layers]
        self.turns = plan.rebased
        self.dtype, self.device, self.map = plan.dtype, device, shard_map
        self.num_shards, self.num_local = shard_map.num_shards, shard_map.num_local
        self.directory = Directory(layers, self.num_shards, device, self.heads)
        self.counters = Counters(num_experts, device)
        self.columns = [layer.columns for layer in plan.layers]  # one number per page each, for policies
        self.rows = Rows(device)
        self.crops = CropLimits(layers, self.rows)
        self.allocate(0)

    def allocate(self, num_rows: int) -> None:
        """Start with empty tables of `num_rows` requests and zeroed entry counters; earlier pages are given back."""
        self.counts = torch.zeros(len(self.layers), num_rows, self.num_local * self.heads, dtype=torch.int32, device=self.device)
        self.free_top = torch.zeros(len(self.layers), dtype=torch.int64, device=self.device)
        self.stores = [
            LayerStore(fmt, self.dtype, self.device, self.counts[i], self.free_top[i], self.heads, turned=None if far else self.undone[i])
            for i, (fmt, far) in enumerate(zip(self.formats, self.far_formats, strict=True))
        ]
        self.far_counts, self.far_free_top = torch.zeros_like(self.counts), torch.zeros_like(self.free_top)
        no_tails = {fmt: self._no_tail(fmt) for fmt in self.far_formats if fmt is not None}
        self.no_tail_nbytes = sum(tail.nbytes for fmt, tail in no_tails.items() if fmt.grouped)
        self.far = [
            None
            if fmt is None
            else LayerStore(
                fmt, self.dtype, self.device, self.far_counts[i], self.far_free_top[i], no_tail=no_tails[fmt], turned=self.undone[i]
            )
            for i, fmt in enumerate(self.far_formats)
        ]
        for store in self.far:
            if store is not None:
                store.reserve(0, 0, 0)  # a table that is read while it is empty has its spare column
        for i, columns in enumerate(self.columns):
            for name, dtype in columns.items():
                for store in self.pools(i):
                    store.add_summary(name, (), dtype, cleared=True)
        self.quiet = 0  # decode steps that surely open no page: nothing to reserve, mirror or give back
        self.rows.start(num_rows)
        self.directory.reset(num_rows)
        self.evicted = self.directory.evicted_by_head()  # [L][R][H]
        self.counters.clear()
        self.mirror()

    def _no_tail(self, fmt: PageFormat) -> Tensor:
        return torch.zeros(1, fmt.num_kv_heads, fmt.group, fmt.k_dim, dtype=tail_dtype(self.dtype), device=self.device)

    def pools(self, layer: int) -> list[LayerStore]:
        """The stores of a layer: the one that entries are appended to, and that of its demoted pages if there are two."""
        near, far = self.stores[layer], self.far[layer]
        return [near] if far is None else [near, far]

    @property
    def all_stores(self) -> list[LayerStore]:
        return [store for layer in range(len(self.layers)) for store in self.pools(layer)]

    @property
    def entries_live(self) -> Tensor:
        """0-d int64, entries in all tables of this rank. Sync: none."""
        return self.counts.sum() + self.far_counts.sum()

    @property
    def metadata_nbytes(self) -> int:
        """Bytes of what says where entries lie, and of their counters."""
        sizes = (self.counts, self.far_counts, self.free_top, self.far_free_top)
        own = sum(x.nbytes for x in sizes) + self.no_tail_nbytes + sum(store.metadata_nbytes for store in self.all_stores)
        return own + self.directory.nbytes + self.counters.nbytes + self.rows.nbytes

    def mirror(self) -> None:
        """Host copies of the sizes that plan the next forward. Sync: one read in forwards that are not quiet; free on CPU."""
        self.stale = False
        self.counts_host, self.free_host, self.load_host = self.counts.cpu(), self.free_top.cpu(), self.directory.load.cpu()

    def change(self, change: RowChange) -> None:
        """Rows are forked, cropped, dropped or new, with all that is kept of them. Raises: RuntimeError, before anything has moved."""
        self.rows.check(change)
        self.quiet = 0
        parent = change.index
        keep, lens = (torch.tensor(x, dtype=torch.int64).to(self.device) for x in (change.keep, change.lens))
        removed = self.directory.fork(parent, keep, lens)
        old, self.counts = self.counts, self.counts.new_zeros(len(self.layers), parent.numel(), self.num_local * self.heads)
        old_far, self.far_counts = self.far_counts, torch.zeros_like(self.counts)
        self.evicted = self.directory.evicted_by_head()
        childless = torch.ones(old.shape[1], dtype=torch.bool, device=self.device)
        childless[parent[parent >= 0]] = False
        some_end = bool((parent < 0).any())  # rows of another generation leave; among forks, dropped rows count as forked away
        for i, store in enumerate(self.stores):
            kept = change.tensor(old[i])
            cut = self.map.own(removed[i], 1).repeat_interleave(self.heads, 1)
            self.counts[i] = kept - cut
            fork(store, parent, self.counts[i])
            cropped = int(cut.sum()) + (int(old[i][childless].sum()) if some_end else 0)
            self.counters.cropped += cropped
            self.counters.forked += int(self.counts[i].sum()) + cropped - int(old[i].sum())
            if self.far[i] is not None:  # a crop never reaches what was demoted (tiers/window.py)
                self.far_counts[i] = change.tensor(old_far[i])
                fork(self.far[i], parent, self.far_counts[i])
                dropped = int(old_far[i][childless].sum()) if some_end else 0
                self.counters.cropped += dropped
                self.counters.forked += int(self.far_counts[i].sum()) + dropped - int(old_far[i].sum())
        self.rows.change(change)
        self.mirror()

    def note_eviction(self, lens: list[int]) -> None:
        """Rows of these lengths have just lost entries to their budget."""
        evicted = self.directory.evicted_by_head()
        lost = [any(old[row] != new[row] for old, new in zip(self.evicted, evicted, strict=True)) for row in range(len(lens))]
        self.evicted = evicted
        self.crops.note_eviction(lens, lost)

    def reserve(self, plan: StepPlan, hold: bool) -> None:
        """Fill in the per-layer sizes of a plan and make sure that its entries will find pages, without knowing their shards yet."""
        if plan.decode and self.quiet:
            self.quiet, self.stale = self.quiet - 1, True
            plan.quiet, plan.may_open, plan.may_spill = True, [False] * len(self.layers), [False] * len(self.layers)
            return
        if self.stale:
            self.mirror()
        page = self.page_size
        num_new, counts = np.array(plan.num_new, dtype=np.int64), self.counts_host.numpy()  # numpy: small sizes, each step
        most_new, total_new = max(plan.num_new, default=0), sum(plan.num_new)
        fullest = counts.max((1, 2), initial=0).tolist()
        opens = [0] * len(self.layers)
        if plan.decode:
            # A row opens a page only when an open page is full; its token may go to any shard, and there to the tables of all heads.
            full = (counts % page == 0).reshape(*counts.shape[:2], self.num_local, self.heads).sum(-1).max(-1, initial=0)
            opens = (full * (num_new > 0)).sum(1).tolist()
        if self.num_shards == 1 and self.storage.capacity_tokens is None:
            # What every open page has left after this step. With several shards spilling is decided anew in each step.
            self.quiet = int((page - 1 - counts % page).min(initial=page - 1)) if plan.decode else 0
        kinds = [(spec.window, sum(map(sum, evicted)) // self.heads) for spec, evicted in zip(self.layers, self.evicted, strict=True)]
        capacity = {
            kind: shard_capacity(self.layers, kind[0], plan.lens_after_host, self.num_shards, page, self.storage.capacity_tokens, kind[1])
            for kind in set(kinds)
        }
        free = self.free_host.tolist()
        fullest_shard = self._tokens(self.load_host).amax(1).tolist() if self.num_shards > 1 else [0] * len(self.layers)
        for i, store in enumerate(self.stores):
            plan.capacity.append(capacity[kinds[i]])
            plan.may_spill.append(self.num_shards > 1 and fullest_shard[i] + total_new > plan.capacity[i])
            needed = opens[i] if plan.decode else self._pages_for_chunk(i, torch.from_numpy(num_new), plan.capacity[i], hold)
            plan.may_open.append(needed > 0)
            store.reserve(free[i], needed, -(-(fullest[i] + most_new) // page))
        if self.num_shards > 1:
            self.directory.reserve(max(plan.lens_after_host, default=0))

    def _pages_for_chunk(self, layer: int, num_new: Tensor, capacity: int, hold: bool) -> int:
        window = self.layers[layer].window
        stored = num_new if window is None or hold else num_new.clamp_max(window - 1)
        room = capacity - self._tokens(self.map.own(self.load_host[layer], 0)) if self.num_shards > 1 and window is None else None
        counts = self.counts_host[layer].view(-1, self.num_local, self.heads)
        if self.heads == 1:
            return pages_to_open(counts.squeeze(-1), stored, room, self.page_size)
        room = None if room is None else room + 1  # loads of heads are rounded up to tokens: a shard may end one above its capacity
        return sum(pages_to_open(counts[..., head], stored, room, self.page_size) for head in range(self.heads))

    def _tokens(self, load: Tensor) -> Tensor:
        """Entries of tables per head as tokens, rounded up."""
        return -(-load // self.heads)

    def expire(self, lens: list[int], margin: int) -> int:
        """Free pages that have left their layer's window; `margin` tokens may still be cropped back. Returns entries expired."""
        if not lens or all(spec.window is None for spec in self.layers):
            return 0
        already = self.counters.expired
        self.crops.note_expiry(lens, margin)
        at = torch.tensor(lens, dtype=torch.int64).to(self.device) - margin
        for spec, store in zip(self.layers, self.stores, strict=True):
            if spec.window is not None:
                self.counters.expired += expire(store, at, spec.window)
        return self.counters.expired - already

    def shrink(self) -> None:
        """Mirror the sizes, then give back slabs of layers with much free space."""
        self.mirror()
        for i, (store, free) in enumerate(zip(self.stores, self.free_host.tolist(), strict=True)):
            self.free_host[i] = store.shrink(free)
        if self.two_pools:
            for store, free in zip(self.far, self.far_free_top.tolist(), strict=True):
                if store is not None:
                    store.shrink(free)

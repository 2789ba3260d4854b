"""Room for the entries of the next forward: pages are reserved before their shards are known, and given back afterwards. Host phase.

R rows, S local shards, L layers.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pikv_ds.config.storage import StorageConfig
from pikv_ds.placement.directory import Directory
from pikv_ds.placement.shard_map import ShardMap
from pikv_ds.spec import LayerSpec
from pikv_ds.step.step import Step

from .counters import Counters
from .layer import LayerPages
from .mirror import Mirror
from .sizing import held_pages, pages_to_open, shard_capacity


class Pages(Protocol):
    """All layers' pages on a rank (layers.py)."""

    layers: list[LayerPages]
    specs: list[LayerSpec]
    storage: StorageConfig
    page_size: int
    heads: int
    num_shards: int
    num_local: int
    map: ShardMap
    directory: Directory
    counters: Counters
    counts: list[Tensor]
    evicted: list[list[list[int]]]
    sizes: Mirror

    def mirror(self) -> None: ...


class Room:
    """Owns nothing of the device: what a rank knows of the room in its pages, and what it has promised."""

    def __init__(self, pages: Pages) -> None:
        self.pages = pages
        self.start()

    def start(self) -> None:
        """Tables are new and empty."""
        self.held: int | None = None
        """Tokens up to which every row may grow before a tensor is replaced (hold); None: nothing is held for them."""
        self.quiet = 0  # decode steps that surely open no page: nothing to reserve, mirror or give back
        self.gives_back = False  # sizes are on their way, by which pools with much free space shrink
        self.unchecked: list[int] | None = None  # capacities of a forward of which it is not known yet whether all entries fitted

    def hold(self, tokens: int) -> None:
        """Make room for rows of up to `tokens` tokens, whichever shards they go to. Until rows change, or one grows longer, decode steps
        replace no tensor of the pages and ask for no sizes. Sync: waits for the sizes.

        Raises: CapacityError where storage.capacity_tokens does not allow so many.
        """
        pages = self.pages
        lens = [tokens] * pages.counts[0].shape[1]
        pages.mirror()
        free = pages.sizes.free(0)
        for i, (layer, capacity) in enumerate(zip(pages.layers, self._capacities(lens), strict=True)):
            needed, columns = held_pages(
                layer.spec, tokens, rows=len(lens), shards=pages.num_local, heads=pages.heads, page_size=pages.page_size, capacity=capacity
            )
            pool = layer.nearest
            added = pool.reserve(int(free[i]), needed - (pool.num_pages - int(free[i])), columns)
            if added and not pages.sizes.on_host:
                free[i] += added
            pool.stays = True
        if pages.num_shards > 1:
            pages.directory.reserve(tokens)
        pages.counters.keep_nothing()
        self.held = tokens

    def let_go(self) -> None:
        """Nothing is held for rows that grow; what is free is given back as after any step."""
        self.held, self.quiet = None, 0
        for layer in self.pages.layers:
            layer.nearest.stays = False

    def _is_held(self, step: Step) -> bool:
        """Whether all that a step may need is there. If so its sizes are filled in, else those of the pages are asked for."""
        pages = self.pages
        assert self.held is not None, "asked where something is held"
        if max(step.lens_after_host, default=0) > self.held:
            self.let_go()
        elif step.decode and not step.hold:  # an announced crop keeps what a window drops
            step.held, step.may_open, step.may_spill = True, [True] * len(pages.layers), [pages.num_shards > 1] * len(pages.layers)
            step.capacity = self._capacities(step.lens_after_host)
            return True
        pages.mirror()
        return False

    def _capacities(self, lens: list[int]) -> list[int]:
        """[L] entries that a shard of each layer may hold when its rows have `lens` tokens. Raises: CapacityError."""
        pages = self.pages
        kinds = [(spec.window, sum(map(sum, evicted)) // pages.heads) for spec, evicted in zip(pages.specs, pages.evicted, strict=True)]
        capacity = {
            kind: shard_capacity(pages.specs, kind[0], lens, pages.num_shards, pages.page_size, pages.storage.capacity_tokens, kind[1])
            for kind in set(kinds)
        }
        return [capacity[kind] for kind in kinds]

    def reserve(self, step: Step) -> None:
        """Fill in the per-layer sizes of a step and make sure that its entries will find pages, without knowing their shards yet."""
        pages = self.pages
        if self.held is not None and self._is_held(step):
            return
        if step.decode and self.quiet:
            self.quiet -= 1
            step.quiet, step.may_open, step.may_spill = True, [False] * len(pages.layers), [False] * len(pages.layers)
            return
        if self.gives_back:
            self._give_back()
        page = pages.page_size
        num_new, counts = np.array(step.num_new, dtype=np.int64), pages.sizes.counts.numpy()  # numpy: small sizes, each step
        most_new, total_new = max(step.num_new, default=0), sum(step.num_new)
        fullest = counts.max((1, 2), initial=0).tolist()
        opens = [0] * len(pages.layers)
        if step.decode:
            # A row opens a page only when an open page is full; its token may go to any shard, and there to the tables of all heads.
            full = (counts % page == 0).reshape(*counts.shape[:2], pages.num_local, pages.heads).sum(-1).max(-1, initial=0)
            opens = (full * (num_new > 0)).sum(1).tolist()
        if pages.num_shards == 1 and pages.storage.capacity_tokens is None:
            # What every open page has left after this step; a row without a token in it opens none. With several shards spilling is
            # decided anew in each step.
            opens_later = (counts % page == 0) & (num_new == 0)[:, None]
            self.quiet = int(np.where(opens_later, 0, page - 1 - counts % page).min(initial=page - 1)) if step.decode else 0
        step.capacity = self._capacities(step.lens_after_host)
        free = pages.sizes.free(0).tolist()
        fullest_shard = self._tokens(pages.sizes.load).amax(1).tolist() if pages.num_shards > 1 else [0] * len(pages.layers)
        for i, layer in enumerate(pages.layers):
            step.may_spill.append(pages.num_shards > 1 and fullest_shard[i] + total_new > step.capacity[i])
            needed = opens[i] if step.decode else self._pages_for_chunk(i, torch.from_numpy(num_new), step.capacity[i], step.hold)
            step.may_open.append(needed > 0)
            added = layer.nearest.reserve(free[i], needed, -(-(fullest[i] + most_new) // page))
            if added and not pages.sizes.on_host:
                pages.sizes.free(0)[i] += added
        if pages.num_shards > 1:
            pages.directory.reserve(max(step.lens_after_host, default=0))

    def _pages_for_chunk(self, layer: int, num_new: Tensor, capacity: int, hold: bool) -> int:
        pages = self.pages
        window = pages.specs[layer].window
        stored = num_new if window is None or hold else num_new.clamp_max(window - 1)
        room = capacity - self._tokens(pages.map.own(pages.sizes.load[layer], 0)) if pages.num_shards > 1 and window is None else None
        counts = pages.sizes.counts[layer].view(-1, pages.num_local, pages.heads)
        if pages.heads == 1:
            return pages_to_open(counts.squeeze(-1), stored, room, pages.page_size)
        room = None if room is None else room + 1  # loads of heads are rounded up to tokens: a shard may end one above its capacity
        return sum(pages_to_open(counts[..., head], stored, room, pages.page_size) for head in range(pages.heads))

    def _tokens(self, load: Tensor) -> Tensor:
        """Entries of tables per head as tokens, rounded up."""
        return -(-load // self.pages.heads)

    def settle(self, step: Step, *, left: bool, refuses_spills: bool) -> None:
        """After a forward: give back slabs of pools with much free space, and say what did not fit.

        left: entries have left. refuses_spills: storage.overflow is "error". A decode step does not wait for the sizes that this takes, as
        long as they are on their way from a device: then both happen at the start of the next forward that may open a page.

        Raises: CapacityError, on all ranks alike.
        """
        pages = self.pages
        if step.held:  # nobody asks how much is free
            if refuses_spills:
                pages.mirror()
                self._check_later(step)
            return
        known = pages.sizes.on_host
        if not known and step.decode and not left and pages.num_shards == 1:
            pages.sizes.follow(torch.tensor(step.num_new), pages.page_size)
            known = True
        if left or not step.quiet:
            if not known:
                pages.mirror()
            self.gives_back = True
            if known or not step.decode:
                self._give_back()
        if refuses_spills:
            self._check_later(step)

    def _check_later(self, step: Step) -> None:
        """At the start of the next forward; where there is nobody to wait for, now."""
        self.unchecked = step.capacity
        if self.pages.sizes.on_host:
            self.check_last()

    def shrink(self) -> None:
        """Give back slabs of pools with much free space, now. Sync: waits for the sizes."""
        self.pages.mirror()
        self._give_back()

    def _give_back(self) -> None:
        pages = self.pages
        self.gives_back, free = False, pages.sizes.free
        for i, layer in enumerate(pages.layers):
            for level, pool in enumerate(layer.pools):
                free(level)[i] = pool.shrink(int(free(level)[i]))

    def check_last(self) -> None:
        """Whether all entries of the last forward fitted, if that is not known yet. Raises: CapacityError, on all ranks alike."""
        pages = self.pages
        if self.unchecked is not None:
            capacity, self.unchecked = self.unchecked, None
            pages.counters.raise_if_overflowed(pages.sizes.spilled, capacity)

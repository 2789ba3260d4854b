"""A decode step in which a layer is three ops: one rank, one token of every row, every query reads all, and nobody watches.

What such a step needs besides its tokens is the same as in the last one, until memory of the pages is replaced. The answers are those of
replicated.py, bit for bit; a step that is anything else goes there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds.modes import eager
from pikv_ds.pages.plain import PlainTables
from pikv_ds.placement.placement import Hashed, Routed
from pikv_ds.step.step import LocalStep, Step

from .way import Core


class Prepared:
    """What plain steps need, until memory of the pages is replaced (addresses.py). R request rows."""

    __slots__ = ("layers", "rows", "step", "stored")

    def __init__(self, layers: list[PlainTables], rows: Tensor, stored: Tensor) -> None:
        self.layers = layers
        """Empty: some layer has pages of another kind."""
        self.rows = rows
        """[R] int64, 0, 1, ..."""
        self.stored = stored
        """[R] bool, all of them."""
        self.step: Step | None = None
        """The one that runs."""


class PlainSteps:
    """Of one cache. What is the same in its plain steps is kept in `pages.addresses`, so that it goes with what it names."""

    def __init__(self, cache: Core) -> None:
        """After all parts of the cache are there."""
        self.cache, pages = cache, cache.pages
        alone = cache.exchange.size == 1 and pages.num_shards == 1 and pages.heads == 1
        read = cache.selection is None and cache.bases is None and not cache.late_experts
        unwatched = all(cache.reader.shares(i) is None for i in range(len(pages.layers)))
        mapped = any(len(layer.plan.pools) > 1 or layer.entry_maps is not None for layer in pages.layers)
        self._possible = alone and read and unwatched and not mapped
        self._num_experts, self._addresses = cache.writer.num_experts, pages.addresses

    def serves(self, local: LocalStep) -> bool:
        """Whether a forward that is about to begin is one, as far as is known before its first layer."""
        agreement = self.cache.agreement
        if not self._possible or not local.plain_decode or agreement.num_rows != [local.num_rows]:
            return False
        return agreement.mode == "local" and all(local.num_new)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, expert_ids: Routed | Tensor | None) -> Tensor | None:
        """As PiKVCache.attend, of a forward that is served: q [R, Hq, D], k and v [R, H, D], contiguous -> [R, Hq, Dv] f32.

        None, with nothing changed: this cache has pages of another kind; ask PiKVCache.attend. No mode of torch may be on but inference
        mode (modes.py). Sync: none.
        """
        kept: Prepared | None = self._addresses.kept
        if kept is None or kept.step is None or kept.step is not self.cache.step:
            kept = self._begin()
        if not kept.layers:
            return None
        step = kept.step
        out = kept.layers[layer].decode(q, k, v, kept.rows, step.positions, scale, step.may_open[layer])
        experts = Hashed(step.positions, self._num_experts) if expert_ids is None else expert_ids
        self.cache.pages.counters.count_appended(experts, kept.stored)
        return out

    def _begin(self) -> Prepared:
        """The first layer of a forward that is served: open it, as a way does."""
        cache = self.cache
        if cache.step is None:
            cache.open(cache.agreement.continue_plain(cache.local), [cache.announced])
        step, kept = cache.step, self._addresses.kept
        if kept is None:  # rows have changed, or the pages have grown
            kept = self._addresses.kept = self._prepared(len(step.num_new))
        if step.positions is None:
            step.set_plain(cache.local.positions.flatten(), kept.rows, kept.stored)
        kept.step = step
        return kept

    @eager
    def _prepared(self, num_rows: int) -> Prepared:
        """It lasts longer than the forward, whatever mode its caller is in."""
        pages = self.cache.pages
        made = [None if layer.events.wrote else PlainTables.of(layer.nearest, layer.spec.window) for layer in pages.layers]
        plain = [each for each in made if each is not None]
        rows, stored = torch.arange(num_rows, device=pages.device), torch.ones(num_rows, dtype=torch.bool, device=pages.device)
        return Prepared(plain if len(plain) == len(made) else [], rows, stored)

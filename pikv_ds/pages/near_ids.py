"""Ids of pages in two tiers: near ones, those of staging, which no table names, and far ones. N near, G staged.

An id below N + G is a row of the pool's memory; what is above is a number that no op may be given. Tables, counts of uses and what is kept
per page know all ids alike; only near ids are on the stack that a step takes pages from.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .addresses import Addresses
from .allocator import PageAllocator


class NearAllocator(PageAllocator):
    """The near ids are all there from the start; far ids come as they are needed and are used again."""

    def __init__(
        self, device: torch.device, free_top: Tensor, freed: Callable[[Tensor], None], addresses: Addresses, near: int, staged: int
    ) -> None:
        super().__init__(device, free_top, freed, addresses)
        self.num_near, self.first_far = near, near + staged
        self.refcount, self.free_stack = (torch.zeros(self.first_far + 1, dtype=torch.int32, device=device) for _ in range(2))
        self._restack()

    def missing(self, free: int, needed: int) -> int:
        return max(needed - free, 0)

    def wasteful(self, free: int) -> bool:
        return False  # near memory is one piece of a fixed size

    @property
    def num_far(self) -> int:
        """Far ids there are, used or not."""
        return self.num_pages - self.first_far

    @property
    def far_used(self) -> Tensor:
        """[num_far] bool."""
        return self.refcount[self.first_far : -1] > 0

    def take_far(self, count: int) -> tuple[Tensor, int]:
        """[count] int64 far ids that nobody names, and how many of them are new at the end. Their uses are the caller's affair."""
        free = torch.nonzero(~self.far_used).flatten()[:count] + self.first_far
        added = count - free.numel()
        if added:
            self._addresses.moved()
            added = max(added, self.num_far // 4)
            new = torch.arange(self.num_pages, self.num_pages + added, device=free.device)
            self.refcount, self.free_stack = (torch.nn.functional.pad(x, (0, added)) for x in (self.refcount, self.free_stack))
            free = torch.cat([free, new])[:count]
        return free, added

    def rename(self, source: Tensor, target: Tensor) -> None:
        """Pages `source` have ids `target` from now on, int64 [n] each; nobody names `source`."""
        self.refcount[target] = self.refcount[source]
        self.refcount[source] = 0
        self._restack()

    def _restack(self) -> None:
        used, near = self.used[: self.num_near], self.num_near
        self.free_stack[:near].copy_(torch.argsort(used.to(torch.int8), stable=True))
        self.free_top.copy_(near - used.sum())

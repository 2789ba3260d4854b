"""Which pages of a pool are free, and how many tables name each of the others. P pages.

The free ids are a stack on the device, so that a step can take pages without asking the host (ops.assign_slots). What is planned between
forwards goes through the methods here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .addresses import Addresses

GROWTH = 32
"""Pages are added in slabs of at least P // GROWTH, and given back once more than that share is free. Growing copies the layer: with n
entries per table once in n / GROWTH steps or more, each of which reads every entry, so 2 * GROWTH / n of what attention moves at most."""


class PageAllocator:
    """Owns ids and counts of uses, no memory: its pool grows and shrinks with it."""

    def __init__(self, device: torch.device, free_top: Tensor, freed: Callable[[Tensor], None], addresses: Addresses) -> None:
        """free_top: 0-d int64 view of what a rank reads once per step. freed: told [P] bool, pages that nobody names any more."""
        self.free_top, self._freed, self._addresses = free_top, freed, addresses
        # One spare element each, never read as a page: tokens that open no page index it.
        self.refcount = torch.zeros(1, dtype=torch.int32, device=device)  # [P + 1] tables that name a page; > 1 after a beam fork
        self.free_stack = torch.zeros(1, dtype=torch.int32, device=device)  # [P + 1] free page ids, free_top of them valid

    @property
    def num_pages(self) -> int:
        return self.refcount.shape[0] - 1

    @property
    def used(self) -> Tensor:
        """[P] bool: some table names the page."""
        return self.refcount[:-1] > 0

    @property
    def nbytes(self) -> int:
        return self.free_stack.nbytes + self.refcount.nbytes

    def missing(self, free: int, needed: int) -> int:
        """Pages to add so that `needed` can be taken, of which `free` are there: none, or a slab."""
        return max(needed - free, self.num_pages // GROWTH) if needed > free else 0

    def wasteful(self, free: int) -> bool:
        """Whether more than 1 / GROWTH of the pages in use are free, and worth giving back."""
        return free > 1 + (self.num_pages - free) // GROWTH

    def add(self, count: int) -> None:
        """`count` new pages are free. Sync: none."""
        self._addresses.moved()
        added = torch.arange(self.num_pages, self.num_pages + count, dtype=torch.int32, device=self.refcount.device)
        self.refcount = torch.nn.functional.pad(self.refcount, (0, count))
        # New ids go on top of the live part of the stack: a host sync is avoided by writing them at free_top on the device.
        self.free_stack = torch.nn.functional.pad(self.free_stack, (0, count))
        self.free_stack.index_copy_(0, self.free_top + torch.arange(count, device=added.device), added.flip(0))
        self.free_top += count

    def take(self, count: int, uses: Tensor | int = 1) -> Tensor:
        """[count] int32 ids of free pages, each named by `uses` tables from now on. Host phase; so many must be there."""
        self.free_top -= count
        top = int(self.free_top)
        assert top >= 0, f"{count} pages asked for, {top + count} are free: reserve them first"
        ids = self.free_stack[top : top + count].clone()
        self.refcount[ids.long()] = uses.to(torch.int32) if isinstance(uses, Tensor) else uses
        return ids

    def share(self, ids: Tensor) -> None:
        """One more table names each of these pages; ids may repeat."""
        self.refcount.index_add_(0, ids.long(), torch.ones_like(ids, dtype=torch.int32))

    def unshare(self, ids: Tensor) -> None:
        """One table fewer names each of these pages, and others go on naming all of them."""
        self.refcount.index_add_(0, ids.long(), torch.full_like(ids, -1, dtype=torch.int32))

    def release(self, ids: Tensor, gone: Tensor) -> None:
        """One table fewer names each of these pages, those that nobody names now are free. ids: of tables, -1 = none; gone: bool, which of
        them, all pages. Sync: none, but for who is told of pages that are free."""
        before = self.used
        self.refcount.index_add_(0, ids.clamp_min(0).flatten().long(), -gone.flatten().to(torch.int32))
        self._freed(before & ~self.used)
        self._restack()

    def recount(self, ids: Tensor) -> None:
        """The tables have changed and name `ids` now, each as often as it stands there. Host phase."""
        before = self.used
        self.refcount.copy_(torch.bincount(ids, minlength=self.num_pages + 1))
        self._freed(before & ~self.used)
        self._restack()

    def compact(self, count: int) -> tuple[Tensor, Tensor]:
        """Pages in use, `count` of them, move down into the holes, in their order, and no page is free. Sync: none.

        Returns: [P] int32, the new id of each page in use; [n] int64, the pages in use.
        """
        self._addresses.moved()
        taken = self.used
        keep = torch.argsort(taken.to(torch.int8), descending=True, stable=True)[:count]
        self.refcount = torch.nn.functional.pad(self.refcount.index_select(0, keep), (0, 1))
        self.free_stack = torch.empty_like(self.refcount)
        self._restack()
        return torch.cumsum(taken, 0, dtype=torch.int32) - 1, keep

    def _restack(self) -> None:
        """Derive the free stack from the counts, in place. Sync: none."""
        used = self.used
        self.free_stack[:-1].copy_(torch.argsort(used.to(torch.int8), stable=True))
        self.free_top.copy_(self.num_pages - used.sum())

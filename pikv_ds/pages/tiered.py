"""A pool of pages in two tiers: so many near ones, where entries are appended, and the rest in a store that no op is given.

R request rows, S tables of a row, C columns of a table. A page that goes far gets another id (near_ids.py), in all tables that name it, and
takes along what is kept of it per page; only its record leaves. Nothing is ever dropped, and every answer is that of one pool: which page
lies where depends on this rank alone. Host tables, on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pikv_ds import ops
from pikv_ds.errors import CapacityError
from pikv_ds.ops import PageFormat
from pikv_ds.ops.memory import aligned_bytes

from .far import LayerTier
from .near_ids import NearAllocator
from .pool import PagePool
from .staged import Staged
from .tier_reader import TierReader
from .victims import leaving
from .view import PageReader


class TieredPool(PagePool):
    """Near memory has a fixed size. Who needs a page when none is free makes others go far, before a step; never in it."""

    def __init__(
        self, fmt: PageFormat, dtype: torch.dtype, counts: Tensor, free_top: Tensor, reader: Callable[[PagePool], PageReader], *,
        tier: LayerTier, **options: Any,
    ) -> None:  # fmt: skip
        """As PagePool; tier: the store is this pool's own."""
        super().__init__(fmt, dtype, counts, free_top, lambda pool: TierReader(pool, reader(pool)), **options)
        self.tier, self.foresees = tier, tier.by_scores
        self.allocator = NearAllocator(self.device, free_top, self._freed, self._addresses, tier.num_near, tier.num_staged)
        self.pages = aligned_bytes((tier.num_near + tier.num_staged) * fmt.record_bytes, self.device).view(-1, fmt.record_bytes)
        self.far_slot = torch.zeros(0, dtype=torch.int64)  # [Q] where the store has a far page
        self.far_positions = torch.zeros(0, fmt.page_size, dtype=torch.int32)  # [Q, page_size]
        self.staged = Staged(tier, self._fetch)
        self.bytes_fetched = 0
        tier.store.clear()

    @property
    def num_pages(self) -> int:
        """Ids of all pages, staging among them: of what is kept per page."""
        return self.allocator.num_pages

    @property
    def num_far(self) -> int:
        """Pages whose records are in the store."""
        return self.tier.store.num_pages

    @property
    def far_slots_used(self) -> Tensor:
        """[n] int64: where the store has them."""
        return self.far_slot[torch.nonzero(self.allocator.far_used).flatten()]

    @property
    def staging_nbytes(self) -> int:
        return self.tier.num_staged * self.fmt.record_bytes

    @property
    def metadata_nbytes(self) -> int:
        return super().metadata_nbytes + self.far_slot.nbytes + self.far_positions.nbytes + self.staged.nbytes

    @property
    def positions(self) -> Tensor:
        """[P, page_size] int32, a copy once pages are far: those of far pages are kept near."""
        near = ops.positions(self.pages, self.fmt)
        return near if not len(self.far_positions) else torch.cat([near, self.far_positions])

    def retire(self) -> None:
        self.staged.close()

    # ---- host phase ----------------------------------------------------------------------------------------------------------

    def reserve(self, free_pages: int, needed: int, table_width: int) -> int:
        """As PagePool.reserve; the pages come from others that go far.

        Raises: CapacityError where too few can go, or the store has no room; nothing has changed then.
        """
        missing = self.allocator.missing(free_pages, needed)
        freed = self.demote(missing) if missing else 0
        self.table.widen(table_width)
        return freed

    def shrink(self, free_pages: int) -> int:
        return free_pages

    def demote(self, count: int) -> int:
        """`count` pages go far, or a sixteenth of the near ones where that is more and they can be spared. Returns how many went."""
        gone = leaving(self, self.tier, count, max(count, self.tier.num_near // 16))
        if len(gone) < count:
            raise CapacityError(
                f"{count} pages are needed near and {len(gone)} of {self.tier.num_near} can go to the tiers below (full ones): near memory "
                f"(pikv.offload.device_gib) holds {self.tier.num_near * self.page_size} tokens of all rows in a layer; raise it, or run "
                f"shorter chunks or fewer requests at once"
            )
        self.staged.wait()
        slots = self.tier.store.write(self.pages, gone)  # may refuse: nothing has changed yet
        far, added = self.allocator.take_far(len(gone))
        if added:
            self._widen(added)
        self.far_slot[far - self.allocator.first_far] = slots
        self.far_positions[far - self.allocator.first_far] = ops.positions(self.pages, self.fmt)[gone]
        self._rename(gone, far)
        return len(gone)

    def bring_open_pages_near(self) -> None:
        """Rows were cut: a page that is no longer full is written to, so it must be near."""
        table, first_far = self.table, self.allocator.first_far
        row, at = torch.nonzero(table.counts % self.page_size, as_tuple=True)
        ids = table.ids[row, at, table.counts[row, at] // self.page_size]
        far = torch.unique(ids[ids >= first_far].to(torch.int64))
        if not len(far):
            return
        near = self.take(len(far)).long()
        self.staged.wait()
        self.tier.store.read(self.far_slot[far - first_far], self.pages, near)
        self._let_go(far)
        self._rename(far, near)

    def _rename(self, source: Tensor, target: Tensor) -> None:
        new_id = torch.arange(self.num_pages, dtype=torch.int32)
        new_id[source] = target.to(torch.int32)
        self.table.renumber(new_id)
        for name, x in self.summaries.items():
            x[target] = x[source]
            if name in self.counters:
                x[source] = 0
        self.allocator.rename(source, target)

    def _widen(self, added: int) -> None:
        for name, x in self.summaries.items():
            self.summaries[name] = torch.cat([x, x.new_zeros(added, *x.shape[1:])])
        self.far_slot = torch.nn.functional.pad(self.far_slot, (0, added))
        self.far_positions = torch.nn.functional.pad(self.far_positions, (0, 0, 0, added))
        self.staged.widen(len(self.far_slot))

    def _freed(self, gone: Tensor) -> None:
        super()._freed(gone)
        far = torch.nonzero(gone[self.allocator.first_far :]).flatten() + self.allocator.first_far
        if len(far):
            self._let_go(far)

    def _let_go(self, far: Tensor) -> None:
        index = far - self.allocator.first_far
        self.staged.drop(index)
        self.tier.store.release(self.far_slot[index])

    def section_bytes(self, sections: int) -> int:
        """Of a record that comes in so many: all of it, or what a head has; positions are not read in staging then."""
        return self.fmt.record_bytes if sections == 1 else self.fmt.head.end

    def _fetch(self, coming: Tensor, sections: int) -> None:
        size = self.section_bytes(sections)
        self.tier.store.read_sections(self.far_slot, coming, self.pages, self.tier.num_near, size)
        self.bytes_fetched += len(coming) * size

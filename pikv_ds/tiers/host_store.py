"""Records in the memory of the host, in slabs that grow with what is kept: pages/far.py's FarStore."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pikv_ds import ops
from pikv_ds.errors import CapacityError
from pikv_ds.ops.memory import aligned_bytes

SLAB = 64
"""Pages of the first slab; each later one has as many as there are, so that slabs are few."""


class HostStore:
    """Owns the slabs, and which slots are free. A slab is never copied, and given back by `clear` only."""

    def __init__(self, record_bytes: int, capacity: int) -> None:
        """capacity: records it may keep."""
        self.record_bytes, self.capacity = record_bytes, capacity
        self.clear()

    def clear(self) -> None:
        self._slabs: list[Tensor] = []
        self._begins = [0]  # of every slab, and the end
        self._free = torch.zeros(0, dtype=torch.int64)

    @property
    def room(self) -> int:
        """Records that it may keep besides."""
        return self.capacity - self.num_pages

    @property
    def num_pages(self) -> int:
        return self._begins[-1] - len(self._free)

    @property
    def nbytes(self) -> int:
        return sum(slab.nbytes for slab in self._slabs)

    def write(self, records: Tensor, ids: Tensor) -> Tensor:
        if len(ids) > self.room:
            raise CapacityError(
                f"{len(ids)} pages of {self.record_bytes} bytes are to go to host memory, which keeps {self.num_pages} of {self.capacity}: "
                f"raise pikv.offload.host_gib, give an nvme_path, or run fewer tokens"
            )
        self._grow(len(ids) - len(self._free))
        slots, self._free = self._free[: len(ids)], self._free[len(ids) :]
        ids = ids.to(torch.int32)
        for slab, at in self._by_slab(slots):
            ops.migrate(slab, records, at, ids)
        return slots

    def read(self, slots: Tensor, out: Tensor, ids: Tensor) -> None:
        ids = ids.to(torch.int32)
        for slab, at in self._by_slab(slots):
            ops.migrate(out, slab, ids, at)

    def read_sections(self, slots: Tensor, coming: Tensor, out: Tensor, first: int, section_bytes: int) -> None:
        ops.gather_sections(out, self._slabs, slots, coming, begins=self._begins[:-1], first=first, section_bytes=section_bytes)

    def release(self, slots: Tensor) -> None:
        self._free = torch.cat([self._free, slots])

    def _grow(self, missing: int) -> None:
        if missing <= 0:
            return
        begin = self._begins[-1]
        count = min(max(missing, SLAB, begin), self.capacity - begin)
        self._slabs.append(aligned_bytes(count * self.record_bytes).view(count, -1))
        self._begins.append(begin + count)
        self._free = torch.cat([self._free, torch.arange(begin, begin + count)])

    def _by_slab(self, slots: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(slab, [m] int32 its row for each of `slots`, -1 = in another), slab after slab."""
        slots = slots.to(torch.int32)
        for slab, begin in zip(self._slabs, self._begins, strict=False):
            at = slots - begin
            yield slab, at if len(self._slabs) == 1 else at.masked_fill_((at < 0) | (at >= len(slab)), -1)

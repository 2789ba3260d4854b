"""Records in a page file, as a FarStore: what is written now and read by this process alone. The file is removed with the store."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pikv_ds import ops
from pikv_ds.errors import CapacityError

from .file_io import FILE_IO
from .page_file import PageFile, Written


class FileStore:
    """Owns one page file. What it can't give back unchanged it refuses (PageFileError)."""

    def __init__(self, path: Path, record_bytes: int, capacity: int, io: str) -> None:
        """capacity: records it may keep. io: of FILE_IO."""
        self.path, self.record_bytes, self.capacity, self._io = path, record_bytes, capacity, io
        self.file: PageFile | None = None
        self._pages: dict[int, Written] = {}
        self._free: list[int] = []
        self._end = 0

    def clear(self) -> None:
        self.close()
        self._pages, self._free, self._end = {}, [], 0

    def close(self) -> None:
        if self.file is not None:
            self.file.close(remove=True)
            self.file = None

    @property
    def room(self) -> int:
        """Records that it may keep besides."""
        return self.capacity - len(self._pages)

    @property
    def num_pages(self) -> int:
        return len(self._pages)

    @property
    def nbytes(self) -> int:
        """Of memory: none."""
        return 0

    @property
    def file_nbytes(self) -> int:
        return 0 if self.file is None else self._end * self.file.stride

    def write(self, records: Tensor, ids: Tensor) -> Tensor:
        if len(ids) > self.room:
            raise CapacityError(
                f"{len(ids)} pages of {self.record_bytes} bytes are to go to {self.path}, which keeps {self.num_pages} of {self.capacity}: "
                f"raise pikv.offload.nvme_gib, or run fewer tokens"
            )
        if self.file is None:
            self.file = PageFile.create(self.path, self.record_bytes, FILE_IO[self._io]())
        free = sorted(self._free)[: len(ids)]
        slots = free + list(range(self._end, self._end + len(ids) - len(free)))
        try:
            written = self.file.write(slots, records.index_select(0, ids).numpy())
        except OSError as error:
            raise CapacityError(
                f"{len(ids)} pages of {self.record_bytes} bytes could not be written to {self.path}: {error.strerror or error}; nothing of "
                f"the cache has changed: free space there, or run fewer tokens"
            ) from error
        taken = set(free)
        self._free = [slot for slot in self._free if slot not in taken]
        self._end = max(self._end, slots[-1] + 1 if slots else 0)
        self._pages.update(zip(slots, written, strict=True))
        return torch.tensor(slots, dtype=torch.int64)

    def read(self, slots: Tensor, out: Tensor, ids: Tensor) -> None:
        order = torch.argsort(slots)  # neighbours are read at once
        records = self.file.read([self._pages[slot] for slot in slots[order].tolist()])
        out.index_copy_(0, ids[order].to(torch.int64), torch.from_numpy(np.ascontiguousarray(records)))

    def read_sections(self, slots: Tensor, coming: Tensor, out: Tensor, first: int, section_bytes: int) -> None:
        pages, which = torch.unique(coming[:, 0], return_inverse=True)
        records = torch.empty(len(pages), self.record_bytes, dtype=torch.uint8)
        self.read(slots[pages], records, torch.arange(len(pages)))
        coming = torch.stack([which, coming[:, 1], coming[:, 2]], 1)
        ops.gather_sections(out, [records], torch.arange(len(pages)), coming, begins=[0], first=first, section_bytes=section_bytes)

    def release(self, slots: Tensor) -> None:
        gone = slots.tolist()
        self.file.release(gone)
        for slot in gone:
            del self._pages[slot]
        self._free += gone

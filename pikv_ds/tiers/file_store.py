"""Records in a page file, as a FarStore: what is written now and read by this process alone. The file is removed with the store."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from pikv_ds import ops
from pikv_ds.errors import CapacityError, PageFileError

from .file_io import FILE_IO
from .page_file import HEAD, PageFile, Written


class FileStore:
    """Owns one page file. What it can't give back unchanged it refuses (PageFileError)."""

    def __init__(self, path: Path, record_bytes: int, capacity: int, io: str, *, sections: int = 1, section_bytes: int = 0) -> None:
        """capacity: records it may keep. io: of FILE_IO. sections: parts of a record, of section_bytes each, that may be read alone."""
        self.path, self.record_bytes, self.capacity, self._io = path, record_bytes, capacity, io
        self._sections, self._section_bytes = sections, section_bytes
        self.file: PageFile | None = None
        self.clear()

    def clear(self) -> None:
        self.close()
        self._pages: dict[int, Written] = {}
        self._free: list[int] = []
        self._end = 0
        self._sums = torch.zeros(0, self._sections + 1, dtype=torch.int64)  # [slots, X + 1] CRC-32 of the sections, and of the record

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
        self._note(torch.tensor(slots, dtype=torch.int64), records, ids)
        taken = set(free)
        self._free = [slot for slot in self._free if slot not in taken]
        self._end = max(self._end, slots[-1] + 1 if slots else 0)
        self._pages.update(zip(slots, written, strict=True))
        return torch.tensor(slots, dtype=torch.int64)

    def _note(self, slots: Tensor, records: Tensor, ids: Tensor) -> None:
        """The checksums of what has been written."""
        if len(slots) and (missing := int(slots.max()) + 1 - len(self._sums)) > 0:
            self._sums = torch.nn.functional.pad(self._sums, (0, 0, 0, max(missing, len(self._sums) // 2)))
        begin = ids.long() * self.record_bytes
        for section in range(self._sections) if self._section_bytes else ():
            self._sums[slots, section] = ops.crc32(records, begin + section * self._section_bytes, size=self._section_bytes)
        self._sums[slots, self._sections] = ops.crc32(records, begin, size=self.record_bytes)

    def read(self, slots: Tensor, out: Tensor, ids: Tensor) -> None:
        numbers = torch.arange(len(slots))
        self.read_sections(slots, torch.stack([numbers, ids.long(), torch.zeros_like(numbers)], 1), out, 0, self.record_bytes)

    def read_sections(self, slots: Tensor, coming: Tensor, out: Tensor, first: int, section_bytes: int) -> None:
        """What is read must have the checksum of what was written, which memory keeps; if it has not, the page's mark says what it is."""
        whole = section_bytes == self.record_bytes
        assert whole or section_bytes == self._section_bytes, f"sections of {section_bytes} bytes, made for {self._section_bytes}"
        (_, row, section), slots = coming.unbind(1), slots[coming[:, 0]]
        at = HEAD + slots * self.file.stride + section * section_bytes
        found = self.file.io.read_parts(at, section_bytes, out, (first + row) * self.record_bytes + section * section_bytes)
        wrong = slots[found != self._sums[slots, self._sections if whole else section]].tolist()
        self.file.bytes_read += len(coming) * section_bytes
        if wrong:
            self.file.read([self._pages[slot] for slot in sorted(set(wrong))])
            raise PageFileError(f"{self.path}: page {wrong[0]} was read twice and differently: the disk or its driver is not to be trusted")

    def release(self, slots: Tensor) -> None:
        gone = slots.tolist()
        self.file.release(gone)
        for slot in gone:
            del self._pages[slot]
        self._free += gone

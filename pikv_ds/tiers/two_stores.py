"""Host memory first, and what does not fit there into a file, as one FarStore."""

from __future__ import annotations

import torch
from torch import Tensor

from .file_store import FileStore
from .host_store import HostStore

FILE = 1 << 40
"""Slots from here on are the file's."""


class TwoStores:
    """A page stays in the store that it went to."""

    def __init__(self, host: HostStore, file: FileStore) -> None:
        self.host, self.file = host, file

    def write(self, records: Tensor, ids: Tensor) -> Tensor:
        host = min(self.host.room, len(ids))
        below = self.file.write(records, ids[host:]) + FILE if host < len(ids) else ids[:0]  # may refuse: nothing has changed yet
        return torch.cat([self.host.write(records, ids[:host]), below])

    def read(self, slots: Tensor, out: Tensor, ids: Tensor) -> None:
        below = slots >= FILE
        for store, own, first in ((self.host, ~below, 0), (self.file, below, FILE)):
            if bool(own.any()):
                store.read(slots[own] - first, out, ids[own])

    def read_sections(self, slots: Tensor, coming: Tensor, out: Tensor, first: int, section_bytes: int) -> None:
        below = slots[coming[:, 0]] >= FILE
        for store, own, base in ((self.host, ~below, 0), (self.file, below, FILE)):
            if bool(own.any()):
                store.read_sections(slots - base, coming[own], out, first, section_bytes)

    def release(self, slots: Tensor) -> None:
        below = slots >= FILE
        if not bool(below.all()):
            self.host.release(slots[~below])
        if bool(below.any()):
            self.file.release(slots[below] - FILE)

    def clear(self) -> None:
        self.host.clear()
        self.file.clear()

    @property
    def num_pages(self) -> int:
        return self.host.num_pages + self.file.num_pages

    @property
    def nbytes(self) -> int:
        return self.host.nbytes

"""Bytes per second of memory, host memory and files of this machine: the numbers of plan_tiers, measured by the tiers' own code."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from pikv_ds import ops
from pikv_ds.ops.memory import aligned_bytes
from pikv_ds.pages.far import FarStore

from .file_io import served
from .file_store import FileStore
from .folder import Folder
from .host_store import HostStore

PAGES, RECORD_BYTES = 1024, 32768 + 64
"""32 MiB of pages: more than most second-level caches, and not long to write."""
STAGED, REPEATS = 64, 5


def of_device() -> float:
    """Reading the device's own memory: the CPU's, as tiers are on the CPU."""
    records = aligned_bytes(PAGES * RECORD_BYTES).random_()
    return _best(records.nbytes, lambda: ops.checksum(records))


def of_host() -> float:
    """Pages from host memory into staging, in no order."""
    return _from_store(HostStore(RECORD_BYTES, PAGES))


def of_files(path: str | Path, io: str = "threads") -> float:
    """Pages from a file in a folder into staging, in no order, each checked. With "threads" they may come from the system's page cache.

    Raises: OSError, UnsupportedError as offload.nvme_io would; CapacityError for a full disk.
    """
    folder = Folder(path, 0)
    store = FileStore(folder.path / "bandwidth.pages", RECORD_BYTES, PAGES, served(io))
    try:
        return _from_store(store)
    finally:
        store.close()
        folder.close()


def _from_store(store: FarStore) -> float:
    staging = aligned_bytes(STAGED * RECORD_BYTES).view(STAGED, -1)
    staging.random_()
    slots = torch.cat([store.write(staging, torch.arange(STAGED)) for _ in range(PAGES // STAGED)])
    order = torch.randperm(PAGES, generator=torch.Generator().manual_seed(0)).split(STAGED)
    places = torch.arange(STAGED)
    coming = [torch.stack([pages, places, torch.zeros_like(places)], 1) for pages in order]

    def read() -> None:
        for some in coming:
            store.read_sections(slots, some, staging, 0, RECORD_BYTES)

    return _best(PAGES * RECORD_BYTES, read)


def _best(num_bytes: int, read: Callable[[], object]) -> float:
    """Of several times the shortest: what others of the machine take is not the tier's."""
    seconds = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        read()
        seconds.append(time.perf_counter() - begin)
    return num_bytes / min(seconds)

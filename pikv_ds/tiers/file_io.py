"""How blocks of a page file are read and written: the contract, threads, and which way serves a name."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from pikv_ds import ops
from pikv_ds.errors import UnsupportedError


class FileIO(Protocol):
    """Of one file. Calls come from one thread at a time."""

    def open(self, path: Path) -> None:
        """The file is there."""

    def write(self, at: Sequence[int], blocks: np.ndarray) -> None:
        """blocks [n, stride] uint8, C-contiguous, to byte offsets `at`. Raises: OSError, for a short write too."""

    def read(self, at: Sequence[int], stride: int) -> Sequence[np.ndarray]:
        """n blocks of `stride` bytes, uint8, from byte offsets `at`; shorter ones where the file ends."""

    def read_parts(self, at: Tensor, size: int, memory: Tensor, to: Tensor) -> Tensor:
        """`size` bytes from each byte offset `at` [n] int64 into memory, uint8, at byte offsets `to` [n] int64: their CRC-32 [n] int64, -1
        where the file ends before (that memory then holds anything)."""

    def sync(self) -> None:
        """What was written is on the disk."""

    def close(self) -> None: ...


class ThreadIO:
    """pread and pwrite in the thread that asks; of many parts, in as many threads as torch has."""

    def __init__(self) -> None:
        self._file, self.close = -1, lambda: None

    def open(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self.close = weakref.finalize(self, os.close, self._file)  # once, also when nobody says so

    def write(self, at: Sequence[int], blocks: np.ndarray) -> None:
        for begin, end in runs(at, blocks.shape[1]):
            data, offset = memoryview(blocks[begin:end]).cast("B"), at[begin]
            while data:
                count = os.pwrite(self._file, data, offset)
                data, offset = data[count:], offset + count

    def read(self, at: Sequence[int], stride: int) -> list[np.ndarray]:
        found: list[np.ndarray] = []
        for begin, end in runs(at, stride):
            data = np.zeros((end - begin) * stride, dtype=np.uint8)
            rest, offset = memoryview(data), at[begin]
            while rest:
                count = os.preadv(self._file, [rest], offset)
                if not count:
                    break
                rest, offset = rest[count:], offset + count
            data = data[: len(data) - len(rest)]
            found += [data[i * stride : (i + 1) * stride] for i in range(end - begin)]
        return found

    def read_parts(self, at: Tensor, size: int, memory: Tensor, to: Tensor) -> Tensor:
        return ops.read_file(memory, to, at, file=self._file, size=size)

    def sync(self) -> None:
        os.fdatasync(self._file)


def runs(at: Sequence[int], stride: int) -> list[tuple[int, int]]:
    """(begin, end) of the runs of offsets that follow each other."""
    if not len(at):
        return []
    breaks = np.flatnonzero(np.diff(np.asarray(at)) != stride) + 1
    edges = [0, *breaks.tolist(), len(at)]
    return list(zip(edges[:-1], edges[1:], strict=True))


FILE_IO: dict[str, Callable[[], FileIO]] = {"threads": ThreadIO}
"""By the names of `offload.nvme_io`; what adapters add is there once they have been imported (`served`)."""
_ADAPTERS = {"async_io": "pikv_ds.adapters.deepspeed.async_io"}


def served(name: str) -> str:
    """The key of FILE_IO that serves offload.nvme_io = name; "auto" is what this machine has, async_io first.

    Raises: UnsupportedError for one that can't be had here.
    """
    if name in FILE_IO:
        return name
    wanted = "async_io" if name == "auto" else name
    try:
        why = import_module(_ADAPTERS[wanted]).refusal()
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("pikv_ds"):
            raise
        why = f"it needs {error.name}, which is not installed"
    if why is None:
        return wanted
    if name == "auto":
        return "threads"
    raise UnsupportedError(f"pikv.offload.nvme_io = {name!r}: {why}; install it, or set 'threads' or 'auto'")

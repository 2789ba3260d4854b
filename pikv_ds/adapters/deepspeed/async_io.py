"""Page files through DeepSpeed's async_io op: libaio, direct reads and writes, many at once. The file format is that of threads.

The op ends the process where a transfer falls short, so space is allocated before it writes, and it reads only what the file has.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pikv_ds import ops
from pikv_ds.errors import UnsupportedError
from pikv_ds.tiers.file_io import FILE_IO, runs

SECTOR = 512
"""Offsets and sizes of direct transfers are multiples of it."""
QUEUE_DEPTH, BLOCK_BYTES = 32, 1 << 20


class AsyncIO:
    """One aio_handle per file. Buffers that the op has not locked are copied through one that it has."""

    def __init__(self) -> None:
        self._path, self._file, self._handle, self.close = "", -1, None, lambda: None

    def open(self, path: Path) -> None:
        """Raises: UnsupportedError where the op can't be built, or the file system takes no direct transfers of SECTOR bytes."""
        self._handle = _op().aio_handle(BLOCK_BYTES, QUEUE_DEPTH, False, False, 1)
        _try_direct(path)
        self._path, self._file = str(path), os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self.close = weakref.finalize(self, os.close, self._file)  # once, also when nobody says so

    def write(self, at: Sequence[int], blocks: np.ndarray) -> None:
        pieces = runs(at, blocks.shape[1])
        for begin, end in pieces:  # a full disk is an error here, and the end of the process in the op
            os.posix_fallocate(self._file, at[begin], (end - begin) * blocks.shape[1])
        data = torch.from_numpy(blocks)
        for begin, end in pieces:
            self._started(self._handle.pwrite(data[begin:end].flatten(), self._path, False, True, at[begin]), "write", at[begin])
        self._wait(len(pieces))

    def read(self, at: Sequence[int], stride: int) -> list[np.ndarray]:
        pieces, size = runs(at, stride), os.fstat(self._file).st_size
        found: list[np.ndarray] = []
        for begin, end in pieces:
            there = max(0, min((end - begin) * stride, size - at[begin])) // SECTOR * SECTOR
            data = torch.zeros(there, dtype=torch.uint8)
            self._read([data] if there else [], [at[begin]])
            found += [data[i * stride : (i + 1) * stride].numpy() for i in range(end - begin)]
        return found

    def read_parts(self, at: Tensor, size: int, memory: Tensor, to: Tensor) -> Tensor:
        begin = at // SECTOR * SECTOR
        span = int((at - begin).max()) + size if len(at) else 0
        span = -(-span // SECTOR) * SECTOR
        there = begin + span <= os.fstat(self._file).st_size
        buffer = torch.empty(int(there.sum()), span, dtype=torch.uint8)
        self._read(list(buffer), begin[there].tolist())
        flat, own = memory.view(-1), to[there]
        for piece, offset, target in zip(buffer, (at - begin)[there].tolist(), own.tolist(), strict=True):
            flat[target : target + size] = piece[offset : offset + size]
        found = torch.full_like(at, -1)
        found[there] = ops.crc32(memory, own, size=size)
        return found

    def sync(self) -> None:
        os.fdatasync(self._file)

    def _read(self, pieces: Sequence[Tensor], at: Sequence[int]) -> None:
        for piece, offset in zip(pieces, at, strict=False):
            self._started(self._handle.pread(piece, self._path, False, True, offset), "read", offset)
        self._wait(len(pieces))

    def _started(self, result: int, what: str, offset: int) -> None:
        if result:
            raise OSError(f"DeepSpeed's async_io did not begin a {what} at byte {offset} of {self._path}")

    def _wait(self, count: int) -> None:
        done = self._handle.wait() if count else 0
        if done != count:
            raise OSError(f"DeepSpeed's async_io has ended {done} of {count} transfers of {self._path}")


@cache
def refusal() -> str | None:
    """Why the op can't be had here, or None. Compiles a line of C once in a process."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if AsyncIOBuilder().is_compatible(verbose=False):
        return None
    return "DeepSpeed's async_io op needs libaio and its header, which are not here (Debian and Ubuntu: apt-get install libaio-dev)"


@cache
def _op() -> Any:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    ctypes.CDLL("libaio.so.1", mode=ctypes.RTLD_GLOBAL)  # a CPU build of the op does not name the library that it calls
    return AsyncIOBuilder().load(verbose=False)


def _try_direct(path: Path) -> None:
    """One direct read as the op makes them, where an error has a name."""
    memory = torch.empty(2 * SECTOR + BLOCK_BYTES // 256, dtype=torch.uint8).numpy()
    start = -memory.ctypes.data % SECTOR
    try:
        file = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        try:
            os.preadv(file, [memoryview(memory)[start : start + SECTOR]], SECTOR)
        finally:
            os.close(file)
    except OSError as error:
        raise UnsupportedError(
            f"pikv.offload.nvme_io = 'async_io' with {path.parent}: its file system takes no direct reads of {SECTOR} bytes "
            f"({error.strerror}); use another nvme_path, or 'threads'"
        ) from error


FILE_IO["async_io"] = AsyncIO

"""Pieces of a file into memory, and their checksums."""

from __future__ import annotations

from torch import Tensor

from .library import OPS


def read_file(memory: Tensor, to: Tensor, at: Tensor, *, file: int, size: int) -> Tensor:
    """memory[to : to + size] gets `size` bytes from byte offset `at` of an open file, for every pair of offsets.

    Args: memory uint8, contiguous, taken as one row of bytes. to, at [n] int64. file: its descriptor.

    Returns: [n] int64, the CRC-32 of what was read; -1 where it could not be read whole (the file ends, the disk fails): that piece of
    memory then holds anything. Sync: waits for the file; holds no lock of the interpreter, and reads with as many threads as torch has.
    """
    return OPS.read_file(memory, to, at, file, size)

"""Checksums of pieces of memory."""

from __future__ import annotations

from torch import Tensor

from .library import OPS


def crc32(memory: Tensor, at: Tensor, *, size: int, seeds: Tensor | None = None) -> Tensor:
    """CRC-32 as zlib.crc32(memory[at : at + size], seed), for every byte offset `at`.

    Args: memory uint8, contiguous, taken as one row of bytes. at [n] int64. seeds [n] int64, None = 0.

    Returns: [n] int64. Sync: reads the host; CPU only. Cost: reads n * size bytes, at about the speed of memory with PCLMULQDQ.
    """
    return OPS.crc32(memory, at, seeds, size)

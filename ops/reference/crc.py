"""Checksums of memory and of parts of files, reference: zlib and os. The arguments are those of ops/crc32.py and ops/read_file.py."""

from __future__ import annotations

import os
import zlib

import torch
from torch import Tensor

from pikv_ds.ops import checks


def crc32(memory: Tensor, at: Tensor, seeds: Tensor | None, size: int) -> Tensor:
    checks.pieces("at", memory, at, at.numel(), size)
    require_seeds = seeds is None or (seeds.dtype == torch.int64 and seeds.numel() == at.numel() and seeds.is_contiguous())
    checks.require(require_seeds, f"seeds must be contiguous int64 [{at.numel()}], got {None if seeds is None else list(seeds.shape)}")
    data, first = memory.flatten().numpy(), [0] * at.numel() if seeds is None else seeds.tolist()
    return torch.tensor([zlib.crc32(data[i : i + size], seed) for i, seed in zip(at.tolist(), first, strict=True)], dtype=torch.int64)


def read_file(memory: Tensor, to: Tensor, at: Tensor, file: int, size: int) -> Tensor:
    checks.pieces("to", memory, to, to.numel(), size)
    checks.pieces("at", None, at, to.numel(), 0)
    flat, found = memory.view(-1).numpy(), []
    for target, offset in zip(to.tolist(), at.tolist(), strict=True):
        piece, done = memoryview(flat[target : target + size]), 0
        try:
            while done < size and (count := os.preadv(file, [piece[done:]], offset + done)):
                done += count
        except OSError:
            done = -1
        found.append(zlib.crc32(piece) if done == size else -1)
    return torch.tensor(found, dtype=torch.int64)

"""What all peers read: queries, keys and values in bf16, and the answer in fp64."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

HEADS, GROUP, DIM = 8, 4, 128  # KV heads, query heads of each, width


class Data(NamedTuple):
    """q [B, HEADS * GROUP, DIM], k and v [B, L, HEADS, DIM], f32 whose values are bf16; answer [B, HEADS * GROUP, DIM] f64."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    answer: np.ndarray


def write(folder: Path, batch: int, context: int) -> None:
    rng = np.random.default_rng(7)
    drawn = {"q": (batch, HEADS * GROUP, DIM), "k": (batch, context, HEADS, DIM), "v": (batch, context, HEADS, DIM)}
    for name, shape in drawn.items():
        np.save(folder / f"{name}.npy", _bits(rng.standard_normal(shape, dtype=np.float32)))
    q, k, v = (_floats(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in drawn)
    answer = np.zeros(drawn["q"])
    for b in range(batch):
        for h in range(HEADS):
            rows = slice(h * GROUP, (h + 1) * GROUP)
            scores = q[b, rows].astype(np.float64) @ k[b, :, h].astype(np.float64).T * DIM**-0.5
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            answer[b, rows] = weights / weights.sum(-1, keepdims=True) @ v[b, :, h].astype(np.float64)
    np.save(folder / "answer.npy", answer)


def read(folder: Path) -> Data:
    q, k, v = (_floats(np.load(folder / f"{name}.npy")) for name in "qkv")
    return Data(q, k, v, np.load(folder / "answer.npy"))


def _bits(x: np.ndarray) -> np.ndarray:
    """f32 -> bf16 as uint16, to nearest, ties to even."""
    u = x.view(np.uint32)
    return ((u + 0x7FFF + (u >> 16 & 1)) >> 16).astype(np.uint16)


def _floats(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)

"""Record layouts that do not exist: what PageFormat refuses."""

from __future__ import annotations

from typing import Protocol

MAX_PAGE_SIZE = 256
MAX_HEAD_DIM = 576
MIN_GROUP = 32  # K scales cost 4 * k_dim bytes per group: 1 bit per element at 32 tokens


class Record(Protocol):
    """What is read of a PageFormat here."""

    name: str
    v_name: str | None
    num_kv_heads: int
    k_dim: int
    v_dim: int
    page_size: int
    group: int
    latent: bool
    rope_raw: bool
    mixed: bool
    grouped: bool
    raw: bool


def check(f: Record) -> None:
    """Raises ValueError with what was given and what is legal. The names are known to be formats."""
    start = f"page format {f.name!r}"
    if f.num_kv_heads < 1:
        raise ValueError(f"{start}: num_kv_heads must be at least 1, got {f.num_kv_heads}")
    if not 1 <= f.page_size <= MAX_PAGE_SIZE:
        raise ValueError(f"{start}: page_size must be 1 to {MAX_PAGE_SIZE}, got {f.page_size}")
    for what, dim in (("k_dim", f.k_dim), ("v_dim", f.v_dim)):
        if dim % 8 or not 8 <= dim <= MAX_HEAD_DIM:
            raise ValueError(f"{start}: {what} must be a multiple of 8 from 8 to {MAX_HEAD_DIM}, got {dim}")
    if f.latent:
        _check_latent(f, start)
    if f.rope_raw and not (f.latent and f.k_dim > f.v_dim and not f.raw):
        raise ValueError(
            f"{start}: rope_raw keeps the last k_dim - v_dim columns of a compressed latent key in fp16; "
            f"got latent {f.latent}, k_dim {f.k_dim}, v_dim {f.v_dim}"
        )
    if f.grouped and (f.group < MIN_GROUP or f.group % 16):
        raise ValueError(f"{start}: K scale group must be a multiple of 16 and at least {MIN_GROUP} tokens, got {f.group}")
    if f.grouped and f.page_size % f.group:
        raise ValueError(
            f"{start} shares K scales over groups of {f.group} tokens, and page_size {f.page_size} "
            f"is not a multiple of {f.group}; use page_size {f.group * max(1, f.page_size // f.group)}"
        )


def _check_latent(f: Record, start: str) -> None:
    if f.v_dim > f.k_dim or f.num_kv_heads != 1:
        raise ValueError(
            f"{start}: a latent layer has one head whose value is a part of its key, "
            f"got {f.num_kv_heads} heads, v_dim {f.v_dim}, k_dim {f.k_dim}"
        )
    if f.mixed:
        raise ValueError(
            f"{start}: the values of a latent layer are columns of its keys, so v_name must be {f.name!r} too, got {f.v_name!r}"
        )

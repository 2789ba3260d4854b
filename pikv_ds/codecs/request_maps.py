"""The maps of requests that have bases of their own (tiers/bases.py), one row beside the other, where others have one Transform for all.

B rows, T columns, H kv heads, G query heads of each, D head_dim, r rank, S shards, C columns of a block table, P entries of a page.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .maps import Attended, Transform


class Column(Protocol):
    """What a row keeps, [R, ...]."""

    value: Tensor


class RequestMaps:
    """The maps of one layer for some rows, to be called as a Transform; k, v [B, H, D, r] f32, orthonormal columns."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v = k, v

    @property
    def v_rank(self) -> int:
        return self.v.shape[-1]

    def of(self, rows: slice) -> RequestMaps:
        return RequestMaps(self.k[rows], self.v[rows])

    def enter(self, q: Tensor, k: Tensor, v: Tensor, scale: float, positions: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, None]:
        return self.fold(q, scale)[0], _encode(k, self.k), _encode(v, self.v), None

    def fold(self, q: Tensor, scale: float) -> tuple[Tensor, None]:
        by_head = q.float().unflatten(2, (self.k.shape[1], -1))
        return torch.einsum("bthgd,bhdr->bthgr", by_head, self.k).flatten(2, 3).to(q.dtype), None

    def leave(self, partial: Attended, shift: None) -> Attended:
        by_head = partial.out.unflatten(2, (self.v.shape[1], -1))
        return partial._replace(out=torch.einsum("bthgr,bhdr->bthgd", by_head, self.v).flatten(2, 3))

    def encode_pages(self, k: Tensor, v: Tensor, positions: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        by_page = (x.unflatten(0, (len(rows), -1)) for x in (k, v))
        return tuple(_encode(x, basis[rows]).flatten(0, 1) for x, basis in zip(by_page, (self.k, self.v), strict=True))

    def decode_pages(self, x: Tensor, side: str) -> Tensor:
        return torch.einsum("bschpr,bhdr->bschpd", x.float(), getattr(self, side))


class RowMaps(RequestMaps):
    """The maps of all rows, wherever these have moved to: k and v are columns of pages/rows.py."""

    def __init__(self, k: Column, v: Column) -> None:
        self._k, self._v = k, v

    @property
    def k(self) -> Tensor:
        return self._k.value

    @property
    def v(self) -> Tensor:
        return self._v.value


def _encode(x: Tensor, basis: Tensor) -> Tensor:
    """Coefficients [B, T, H, r] of x [B, T, H, D], in its dtype."""
    return torch.einsum("bthd,bhdr->bthr", x.float(), basis).to(x.dtype)


def leading(second: Tensor, rank: int) -> Tensor:
    """The first `rank` eigenvectors [..., D, r] f32 of [..., D, D], largest eigenvalue first."""
    return torch.linalg.eigh(second.double())[1].flip(-1)[..., :rank].float()


PageMaps = Transform | RequestMaps
"""What stands between a model's heads and far pages."""

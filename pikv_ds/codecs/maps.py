"""Linear maps between a model's heads and what pages hold, folded into queries and outputs so that attention never reconstructs a key.

    c = (k - m) E       stored in place of k, r wide       k_hat = c U + m
    q' = q U^T          so that q . k_hat = q' . c + q . m
    out = out' U_v + m_v, with out' the attention over stored values' coefficients; the weights of a softmax sum to one

q . m is the same for every key of a kv head: it changes no attention weight, only the lse, which the merge with keys outside of the store
(the forward's own chunk, sinks) needs. This is what MLA does with its latent (DeepSeek-V2, arXiv 2405.04434, section 2.1).

Maps of un-rotated keys are another case: c = (R^T k - m) E and k_hat = R (c U + m), R the rotation at the key's position. It stands between
U and q, so that only values are folded; pages/unrotated.py reads such pages.

B rows, T columns, H kv heads, G query heads of each, D head_dim, r width of a coefficient vector.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor

from .rope import rotate


class Attended(Protocol):
    """Attention over coefficients (step/query.py): out [B, T, H * G, r], lse [B, T, H * G], whether it is over nothing."""

    out: Tensor
    lse: Tensor
    empty: bool

    def _replace(self, **changed: Tensor) -> Self: ...


class Linear(NamedTuple):
    """x_hat = (x - mean) encode decode + mean, for every kv head. f32."""

    encode: Tensor  # [H, D, r]
    decode: Tensor  # [H, r, D]
    mean: Tensor | None = None  # [H, D]; None = 0

    @property
    def rank(self) -> int:
        return self.decode.shape[1]

    def to(self, device: torch.device) -> Self:
        return Linear(*(None if x is None else x.to(device, torch.float32).contiguous() for x in self))

    def heads(self, begin: int, count: int) -> Self:
        """The maps of `count` heads from `begin` on."""
        return Linear(*(None if x is None else x[begin : begin + count] for x in self))

    def apply(self, x: Tensor) -> Tensor:
        """Coefficients [..., H, r] of x [..., H, D], in its dtype."""
        centred = x.float() if self.mean is None else x.float() - self.mean
        return torch.einsum("...hd,hdr->...hr", centred, self.encode).to(x.dtype)

    def invert(self, c: Tensor) -> Tensor:
        """x_hat [..., H, D] f32 of coefficients [..., H, r]."""
        x = torch.einsum("...hr,hrd->...hd", c.float(), self.decode)
        return x if self.mean is None else x + self.mean

    def after(self, inner: Self) -> Self:
        """This map applied to the coefficients of `inner`."""
        mean = inner.mean
        if self.mean is not None:
            shift = torch.einsum("hr,hrd->hd", self.mean, inner.decode)
            mean = shift if mean is None else mean + shift
        # (x - m) E_inner - m_own = (x - m - m_own U_inner) E_inner, as E_inner inverts U_inner on coefficients.
        return Linear(inner.encode @ self.encode, self.decode @ inner.decode, mean)


def unchanged(num_heads: int, dim: int) -> Linear:
    """The map that changes nothing."""
    eye = torch.eye(dim, dtype=torch.float32).expand(num_heads, dim, dim)
    return Linear(eye, eye)


class Transform:
    """The maps of one layer. For a latent layer `k` maps the first v_dim columns, its values, among themselves, as `v` does.

    inv_freq [D / 2] f32: `k` maps keys before this rotation (codecs/rope.py); None: as they come.
    """

    def __init__(self, k: Linear, v: Linear, inv_freq: Tensor | None = None) -> None:
        self.k, self.v, self.inv_freq = k, v, inv_freq

    @property
    def v_rank(self) -> int:
        return self.v.rank

    def to(self, device: torch.device) -> Transform:
        inv_freq = None if self.inv_freq is None else self.inv_freq.to(device, torch.float32)
        return Transform(self.k.to(device), self.v.to(device), inv_freq)

    def enter(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """What the store is given for q [B, T, H * G, D], k [B, T, H, D], v [B, T, H, Dv] (latent: Dv = 0), in their dtypes.

        positions: [B, T] int32, needed with inv_freq; -1 = padding.
        Returns: q', the coefficients of k and v, and scale * q . mean [B, T, H * G] f32, which is missing in the lse; None = 0.
        """
        c_v = self.v.apply(v) if v.shape[-1] else v
        if self.inv_freq is not None:  # the query stays: keys are put together again where they are read
            return q, self.k.apply(rotate(k, positions, self.inv_freq, back=True)).to(k.dtype), c_v, None
        folded, shift = self.fold(q, scale)
        return folded, self.k.apply(k), c_v, shift

    def keys(self, c: Tensor, positions: Tensor) -> Tensor:
        """The rotated keys [..., H, D] f32 that coefficients [..., H, r] of un-rotated ones stand for at positions [...]. With inv_freq."""
        return rotate(self.k.invert(c), positions, self.inv_freq)

    def of(self, rows: slice) -> Self:
        """The maps of some rows: here the same for all (tiers/bases.py has others)."""
        return self

    def encode_keys(self, k: Tensor, positions: Tensor) -> Tensor:
        """Coefficients [N, H, r] of keys [N, H, D] at positions [N]."""
        return self.k.apply(k if self.inv_freq is None else rotate(k, positions, self.inv_freq, back=True))

    def encode_pages(self, k: Tensor, v: Tensor, positions: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients of entries k, v [n * P, H, D] at positions [n * P], of n pages, which are of rows [n] int64."""
        return self.encode_keys(k, positions), self.v.apply(v)

    def decode_pages(self, x: Tensor, side: str) -> Tensor:
        """What coefficients x [R, S, C, H, P, r] of all rows stand for, f32; side "k" or "v"."""
        return getattr(self, side).invert(x.transpose(3, 4)).transpose(3, 4)

    def fold(self, q: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
        """q' and the shift of the lse, as in `enter`. With inv_freq the query stays."""
        if self.inv_freq is not None:
            return q, None
        by_head = q.float().unflatten(2, (self.k.decode.shape[0], -1))  # [B, T, H, G, D]
        folded = torch.einsum("bthgd,hrd->bthgr", by_head, self.k.decode).flatten(2, 3).to(q.dtype)
        shift = None if self.k.mean is None else scale * torch.einsum("bthgd,hd->bthg", by_head, self.k.mean).flatten(2, 3)
        return folded, shift

    def leave(self, partial: Attended, shift: Tensor | None) -> Attended:
        """Attention over coefficients, as attention over what they stand for; 0 and -inf stay where nothing is stored."""
        out = partial.out
        if partial.empty:
            return partial._replace(out=out.new_zeros(*out.shape[:3], self.v.decode.shape[2]))
        by_head = out.unflatten(2, (self.v.decode.shape[0], -1))
        out = torch.einsum("bthgr,hrd->bthgd", by_head, self.v.decode)
        if self.v.mean is not None:
            out = out + self.v.mean.unsqueeze(1)
            out = torch.where(torch.isneginf(partial.lse).view(*out.shape[:4], 1), 0, out)
        return partial._replace(out=out.flatten(2, 3), lse=partial.lse if shift is None else partial.lse + shift)

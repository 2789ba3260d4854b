"""A seeded random rotation before another codec's record: outliers of single channels are spread over all of them. No method of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds.codecs.base import Codec
from pikv_ds.codecs.maps import Linear, Transform, unchanged
from pikv_ds.ops import PageFormat
from pikv_ds.spec import LayerSpec


class Rotated(Codec):
    """x -> (x * s) H with s random signs and H = Hadamard / sqrt(n), orthogonal: what the inner codec stores, rotated.

    A width n that is no power of two is cut into blocks that are, the largest first (96 = 64 + 32): every width is a multiple of 8. In a
    latent layer the first v_dim columns, its values, and the rotary rest rotate apart; a rest that is stored raw does not.
    Source: QuIP#, arXiv 2402.04396 (random signs, then Hadamard); QuaRot, arXiv 2404.00456 (KV cache).
    """

    def __init__(self, inner: Codec, seed: int) -> None:
        self.inner, self.seed = inner, seed
        self.name, self.calibrated, self.group = inner.name, inner.calibrated, inner.group
        self.light, self.light_ratio = inner.light, inner.light_ratio  # light pages hold what is rotated as well
        self.per_request, self.rope_raw = inner.per_request, inner.rope_raw
        if inner.per_request:
            self.fit_tokens = inner.fit_tokens

    @property
    def preferred_page_size(self) -> int:
        return self.inner.preferred_page_size

    def format_name(self, dtype: torch.dtype) -> str:
        return self.inner.format_name(dtype)

    def page_size(self, wanted: int | None) -> int:
        return self.inner.page_size(wanted)

    def page_format(self, spec: LayerSpec, page_size: int, dtype: torch.dtype) -> PageFormat:
        return self.inner.page_format(spec, page_size, dtype)

    def ready(self) -> None:
        self.inner.ready()

    def stored(self, spec: LayerSpec) -> LayerSpec:
        return self.inner.stored(spec)

    def check_model(self, spec: LayerSpec, norms: Tensor) -> None:
        self.inner.check_model(spec, norms)

    def declared_errors(self, spec: LayerSpec, page_size: int, dtype: torch.dtype) -> tuple[float, float]:
        rounding = torch.finfo(dtype).eps + 2.0**-20  # of the rotated numbers to the model's dtype, of the maps
        return tuple(error + rounding for error in self.inner.declared_errors(spec, page_size, dtype))

    def request_bytes(self, spec: LayerSpec) -> int:
        return self.inner.request_bytes(spec)

    def request_rotation(self, spec: LayerSpec) -> tuple[Tensor, Tensor]:
        stored = self.inner.stored(spec)
        return self._rotation(spec, stored.k_dim, salt=0), self._rotation(spec, stored.v_dim, salt=1)

    def transform(self, spec: LayerSpec) -> Transform | None:
        if self.per_request:  # its maps are those of requests, rotated by request_rotation
            return None
        stored = self.inner.stored(spec)
        inner = self.inner.transform(spec) or Transform(unchanged(spec.num_kv_heads, spec.k_dim), unchanged(spec.num_kv_heads, spec.v_dim))
        if spec.latent:
            v = self._rotation(spec, stored.v_dim, salt=0)
            width = stored.k_dim - stored.v_dim
            rest = unchanged(1, width).encode if self.keeps_rope(spec) else self._rotation(spec, width, salt=1)
            k = torch.stack([torch.block_diag(a, b) for a, b in zip(v, rest, strict=True)])
        else:
            k, v = self._rotation(spec, stored.k_dim, salt=0), self._rotation(spec, stored.v_dim, salt=1)
        return Transform(Linear(k, k.mT).after(inner.k), Linear(v, v.mT).after(inner.v), inner.inv_freq)

    def _rotation(self, spec: LayerSpec, width: int, salt: int) -> Tensor:
        """[H, width, width] f32, orthogonal; signs by seed, layer, head of the whole model."""
        generator = torch.Generator().manual_seed((self.seed * 65_537 + spec.layer_idx) * 2 + salt)
        heads = spec.first_head + spec.num_kv_heads
        signs = torch.randint(0, 2, (heads, width), generator=generator)[spec.first_head :].float() * 2 - 1
        return signs.unsqueeze(-1) * hadamard(width)


def hadamard(width: int) -> Tensor:
    """[width, width] f32, symmetric and orthogonal: blocks of the powers of two that sum to the width."""
    blocks, left = [], width
    while left:
        size = 1 << (left.bit_length() - 1)
        block = torch.ones(1, 1)
        while block.shape[0] < size:
            block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
        blocks.append(block / size**0.5)
        left -= size
    return torch.block_diag(*blocks)

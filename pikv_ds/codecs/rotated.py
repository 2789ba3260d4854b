"""A seeded random rotation before another codec's record: outliers of single channels are spread over all of them. No method of its own.

x -> (x * s) H with s random signs and H = Hadamard / sqrt(n), orthogonal. A width n that is no power of two is cut into blocks that are,
the largest first (96 = 64 + 32): every width is a multiple of 8.
Source: QuIP#, arXiv 2402.04396 (random signs, then Hadamard); QuaRot, arXiv 2404.00456 (KV cache).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pikv_ds.codecs.base import PoolSpec
from pikv_ds.codecs.maps import Linear, Transform, unchanged
from pikv_ds.spec import LayerSpec


def rotated(pool: PoolSpec, seed: int) -> PoolSpec:
    """What the pool stores, rotated. Light pages hold what is rotated as well; maps of requests are rotated after each fit.

    In a latent layer the first v_dim columns, its values, and the rotary rest rotate apart; a rest that is stored raw does not.
    """
    rounding = torch.finfo(pool.dtype).eps + 2.0**-20  # of the rotated numbers to the model's dtype, of the maps
    fitted, stored = pool.fitted, pool.stored
    if fitted is not None:
        turns = rotation(pool.layer, stored.k_dim, seed, salt=0), rotation(pool.layer, stored.v_dim, seed, salt=1)
        fitted = fitted._replace(rotation=turns)
    return replace(pool, transform=lambda: _maps(pool, seed), fitted=fitted, rounding=pool.rounding + rounding)


def _maps(pool: PoolSpec, seed: int) -> Transform | None:
    """Those of the pool, with a rotation after them."""
    if pool.fitted is not None:  # they are those of requests
        return None
    layer, k_dim, v_dim = pool.layer, pool.stored.k_dim, pool.stored.v_dim
    inner = pool.maps or Transform(unchanged(layer.num_kv_heads, layer.k_dim), unchanged(layer.num_kv_heads, layer.v_dim))
    if layer.latent:
        v, width = rotation(layer, v_dim, seed, salt=0), k_dim - v_dim
        rest = unchanged(1, width).encode if pool.codec.keeps_rope(layer) else rotation(layer, width, seed, salt=1)
        k = torch.stack([torch.block_diag(a, b) for a, b in zip(v, rest, strict=True)])
    else:
        k, v = rotation(layer, k_dim, seed, salt=0), rotation(layer, v_dim, seed, salt=1)
    return Transform(Linear(k, k.mT).after(inner.k), Linear(v, v.mT).after(inner.v), inner.inv_freq)


def rotation(spec: LayerSpec, width: int, seed: int, salt: int) -> Tensor:
    """[H, width, width] f32, orthogonal; signs by seed, layer, head of the whole model."""
    generator = torch.Generator().manual_seed((seed * 65_537 + spec.layer_idx) * 2 + salt)
    heads = spec.first_head + spec.num_kv_heads
    signs = torch.randint(0, 2, (heads, width), generator=generator)[spec.first_head :].float() * 2 - 1
    return signs.unsqueeze(-1) * hadamard(width)


def hadamard(width: int) -> Tensor:
    """[width, width] f32, symmetric and orthogonal: blocks of the powers of two that sum to the width."""
    blocks, left = [], width
    while left:
        size = 1 << (left.bit_length() - 1)
        block = torch.ones(1, 1, dtype=torch.float32)
        while block.shape[0] < size:
            block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
        blocks.append(block / size**0.5)
        left -= size
    return torch.block_diag(*blocks)

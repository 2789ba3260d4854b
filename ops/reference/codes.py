"""Rows and groups of numbers as codes and scales, in plain torch: the arithmetic that every compiled version repeats bit by bit.

All of it is f32 with one rounding per step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds.ops.format.formats import FP4_BLOCK, fp4_blocks

_F16_MAX = 65504.0
_F8_MAX = 448.0
_F4_MAX = 6.0
_F4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_F4_EXPONENTS = (-64, 63)  # of a row's power of two
_F4_LIMIT = _F8_MAX * _F4_MAX * 2.0 ** _F4_EXPONENTS[1]


def encode_integers(x: Tensor, levels: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 codes of x and the fp16 scale and zero that `dim` shares (kept as size 1): value = code * scale + zero.

    The codes are computed from the rounded scale and zero, so their rounding shifts the grid and is no error of its own.
    """
    x = x.float()
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    zero = saturated_half(low)
    scale = ((high.clamp(-_F16_MAX, _F16_MAX) - zero.float()) * (1.0 / levels)).clamp_min(0).half()
    inverse = torch.where(scale > 0, 1.0 / scale.float(), 0.0)
    code = ((x - zero.float()) * inverse).round().clamp(0, levels).to(torch.uint8)
    return code, scale, zero


def saturated_half(x: Tensor) -> Tensor:
    """fp16; what is beyond +-65504 becomes that, NaN stays."""
    return x.float().clamp(-_F16_MAX, _F16_MAX).half()


def encode_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 codes of rows and their fp16 scale, the smallest power of two that keeps the row within +-448 (2^-24 to 2^15)."""
    x = x.float()
    fraction, exponent = torch.frexp(x.abs().amax(-1, keepdim=True))  # fraction in [0.5, 1); 448 = 0.875 * 2^9
    exponent = (exponent - 9 + (fraction > 0.875)).clamp(-24, 15)
    scale = torch.ldexp(torch.ones_like(fraction), exponent)
    code = (x / scale).clamp(-_F8_MAX, _F8_MAX).to(torch.float8_e4m3fn)
    return code, scale.half()


def encode_fp4(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """e2m1 codes of rows [..., D] (uint8, sign in bit 3), e4m3 block scales [..., ceil(D / 16)] as bytes, biased exponents [..., 1] uint8.

    The exponent is the smallest that keeps the row within 6 * 448 * 2^exponent. A NaN counts as 0, what is larger than the largest
    exponent can hold saturates.
    """
    x = x.float().nan_to_num(0.0).clamp(-_F4_LIMIT, _F4_LIMIT)
    D, blocks = x.shape[-1], fp4_blocks(x.shape[-1])
    x = torch.nn.functional.pad(x, (0, blocks * FP4_BLOCK - D)).unflatten(-1, (blocks, FP4_BLOCK))
    top = x.abs().amax(-1)  # [..., blocks]
    fraction, exponent = torch.frexp(top.amax(-1, keepdim=True))  # 2688 = 0.65625 * 2^12
    exponent = (exponent - 12 + (fraction > 0.65625)).clamp(*_F4_EXPONENTS)
    scale = (torch.ldexp(top, -exponent) * (1.0 / _F4_MAX)).clamp_max(_F8_MAX).to(torch.float8_e4m3fn)
    inverse = torch.where(scale.float() > 0, torch.ldexp(1.0 / scale.float(), -exponent), 0.0).unsqueeze(-1)
    size = x.abs() * inverse
    code = (size > 0.25).to(torch.uint8)  # to nearest; a tie goes to the even code
    for step in (size >= 0.75, size > 1.25, size >= 1.75, size > 2.5, size >= 3.5, size > 5.0):
        code += step
    code |= ((x < 0) & (code > 0)).to(torch.uint8) << 3  # one zero only: the bounds of pages would otherwise depend on the order
    return code.flatten(-2)[..., :D], scale.view(torch.uint8), (exponent + 127).to(torch.uint8)


def decode_fp4(code: Tensor, scale: Tensor, exponent: Tensor) -> Tensor:
    """code [..., D] as encode_fp4 gives it, scale [..., ceil(D / 16)] e4m3 bytes, exponent [...] uint8 -> f32; no step rounds."""
    values = torch.tensor((*_F4_VALUES, *(-x for x in _F4_VALUES)), device=code.device)[code.int()]
    row = torch.ldexp(torch.ones(exponent.shape, device=code.device), exponent.int() - 127).unsqueeze(-1)
    return values * (scale.view(torch.float8_e4m3fn).float() * row).repeat_interleave(FP4_BLOCK, -1)[..., : code.shape[-1]]


def pack_bits(code: Tensor, bits: int) -> Tensor:
    """uint8 codes of `bits` bits [..., D] into bytes [..., D * bits / 8], the first column in the lowest bits."""
    per_byte = 8 // bits
    packed = code[..., 0::per_byte].clone()
    for i in range(1, per_byte):
        packed |= code[..., i::per_byte] << bits * i
    return packed


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """What pack_bits packed."""
    return torch.stack([packed >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)], -1).flatten(-2)

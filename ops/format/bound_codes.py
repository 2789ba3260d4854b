"""Page bounds of type int8: codes and a scale of their own for the minima and for the maxima of a page and head.

A row of D bounds is D int8 codes and a bf16 scale, D + 2 bytes: bound = code * scale, exact in f32. Codes and scale are rounded so that the
decoded box holds the box that was encoded; a scale is the largest |bound| of its row / 127, rounded up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .formats import PageFormat

SCALE_BYTES = 2
_MAX = torch.finfo(torch.float32).max
_LEVELS = 127


def bounds_shape(fmt: PageFormat, dtype: torch.dtype, k_dim: int | None = None) -> tuple[int, int, int]:
    """Shape of the bounds of one page: [H, 2, Dk], and int8 codes with their scale [H, 2, Dk + 2]. k_dim: Dk, if not that of the record."""
    return fmt.num_kv_heads, 2, (k_dim or fmt.k_dim) + (SCALE_BYTES if dtype == torch.int8 else 0)


def encode_box(box: Tensor) -> Tensor:
    """box [..., 2, D] f32, minima and maxima -> int8 [..., 2, D + 2]. Infinite bounds count as the largest f32. Sync: none."""
    sign = torch.tensor([1.0, -1.0], device=box.device).unsqueeze(-1)  # rounding a maximum up is rounding its negative down
    x = box.clamp(-_MAX, _MAX) * sign
    top = x.abs().amax(-1, keepdim=True)
    scale = -not_above(-(top / _LEVELS), torch.bfloat16)
    # top / 127 may itself have been rounded down
    scale = torch.where(scale.float() * _LEVELS < top, (scale.view(torch.int16) + 1).view(torch.bfloat16), scale)
    s = scale.float()
    code = (x / s).floor()
    code = torch.where(code * s > x, code - 1, code)  # the quotient was rounded up to a whole number
    code = torch.where(s > 0, code, 0) * sign
    return torch.cat((code.to(torch.int8), scale.view(torch.int8)), -1)


def decode_box(bounds: Tensor) -> Tensor:
    """Bounds [..., 2, D], or int8 [..., 2, D + 2] -> f32 [..., 2, D]. Sync: none."""
    if bounds.dtype != torch.int8:
        return bounds.float()
    return bounds[..., :-SCALE_BYTES].float() * bounds[..., -SCALE_BYTES:].contiguous().view(torch.bfloat16).float()


def not_above(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest number of a 16-bit dtype that is not above x; f32 as it is."""
    nearest = x.to(dtype)
    if dtype == torch.float32:
        return nearest
    bits = nearest.view(torch.int16)
    # Sign and magnitude: towards -inf a positive number counts down, a negative one up; both zeros step to the smallest negative.
    below = torch.where(bits & 0x7FFF == 0, -0x7FFF, torch.where(bits < 0, bits + 1, bits - 1)).to(torch.int16)
    return torch.where(nearest.float() > x, below, bits).view(dtype)

"""Attention by torch's fused CUDA kernels, with its log-sum-exp: which of them serves, and how each wants its arguments.

Shapes: B batch, H heads, T queries, L keys, D head_dim. No score is ever held. Computed in the dtype of keys and values, sums in f32.

    flash      bf16 and fp16, Dk == Dv, no mask: all keys, causal, or causal within a window (_flash_attention_forward)
    efficient  a mask as a bias, Dk != Dv, latents, f32 keys under 16-bit queries (coded pages): _scaled_dot_product_efficient_attention
    math       the scores in f32, tile by tile (sdpa_lse.py): f32 and f64 queries, whose results are the oracle, and scores with a cap
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FUSED_ON = ("cuda",)  # device types that have these kernels
_16_BIT = (torch.bfloat16, torch.float16)
_FLASH_CAPABILITY = (8, 0)
_FLASH_DIM = 256
_ALIGN_BYTES = 16  # of a row of q, k, v and of the bias
_HIDDEN = {torch.float16: -6e4}  # of a hidden key, finite: a kernel that sees nothing else in a tile would divide by zero
_BIAS = 1 << 25  # elements of a bias at a time: 64 MiB in 16 bits


class Asked(NamedTuple):
    """What the choice depends on: nothing that lies on the device."""

    device: str  # a type
    capability: tuple[int, int]
    queries: torch.dtype
    keys: torch.dtype  # and of the values
    k_dim: int
    v_dim: int
    masked: bool
    empty: bool = False  # no query or no key
    softcap: bool = False


def path_of(a: Asked) -> str:
    """ "flash", "efficient" or "math"."""
    if a.device not in FUSED_ON or a.softcap or a.empty or a.queries not in _16_BIT:
        return "math"
    if a.keys not in (a.queries, torch.float32) or (a.keys == torch.bfloat16 and a.capability < _FLASH_CAPABILITY):
        return "math"
    if any(dim * a.keys.itemsize % _ALIGN_BYTES for dim in (a.k_dim, a.v_dim)):
        return "math"
    fits = a.keys in _16_BIT and a.k_dim == a.v_dim <= _FLASH_DIM and a.capability >= _FLASH_CAPABILITY
    return "flash" if fits and not a.masked else "efficient"


def path_for(q: Tensor, k: Tensor, v: Tensor, *, masked: bool, softcap: bool) -> str:
    """`path_of` the arguments of sdpa_lse."""
    device = q.device.type
    if device not in FUSED_ON or k.dtype != v.dtype:
        return "math"
    capability = torch.cuda.get_device_capability(q.device) if device == "cuda" else _FLASH_CAPABILITY
    empty = not (q.shape[2] and k.shape[2])
    return path_of(Asked(device, capability, q.dtype, k.dtype, k.shape[-1], v.shape[-1], masked, empty, softcap))


def flash(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: int | None) -> tuple[Tensor, Tensor]:
    """window: with causal, query t sees keys t - window + 1 to t. Query heads share kv heads inside the kernel."""
    q, k, v = (_rows(x) for x in (q, k, v))
    if window is None:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
    else:
        heads_last = (x.transpose(1, 2) for x in (q, k, v))
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            *heads_last,
            None,
            None,
            q.shape[2],
            k.shape[2],
            0.0,
            causal,
            False,
            scale=scale,
            window_size_left=window - 1,
            window_size_right=0,
        )
        out = out.transpose(1, 2)
    return out.float(), lse


def efficient(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, causal: bool, window: int | None
) -> tuple[Tensor, Tensor]:
    """mask: bool [B or 1, 1, T or 1, L]. The bias that it becomes is held for some queries at a time."""
    B, Hq, T, D = q.shape
    group, L = Hq // k.shape[1], k.shape[2]
    alike = not causal and (mask is None or mask.shape[2] == 1)
    q, k, v = q.to(k.dtype), _rows(k), _rows(v)
    if group > 1 and alike:
        # Every query sees the same keys: the heads of a kv head become rows of one, so that keys need no copy per head.
        out, lse = _efficient(q.reshape(B, k.shape[1], group * T, D), k, v, scale, mask, causal=False)
        return out.reshape(B, Hq, T, -1), lse.reshape(B, Hq, T)
    k, v = (x if group == 1 else x.repeat_interleave(group, 1) for x in (k, v))
    if alike or (causal and window is None):
        return _efficient(_rows(q), k, v, scale, mask, causal)
    tile = max(1, _BIAS // (B * L))
    parts = []
    for start in range(0, T, tile):
        rows = slice(start, start + tile)
        seen = mask[:, :, rows] if mask is not None else in_order(range(T)[rows], L, window, q.device)
        parts.append(_efficient(_rows(q[:, :, rows]), k, v, scale, seen, causal=False))
    if len(parts) == 1:
        return parts[0]
    return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)


def in_order(queries: range, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """[1, 1, len(queries), L] bool: causal, and within the window if there is one."""
    at = torch.arange(queries.start, queries.stop, device=device).unsqueeze(1)
    keys = torch.arange(num_keys, device=device)
    seen = keys <= at
    return (seen if window is None else seen & (keys > at - window))[None, None]


def _efficient(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
    """All of q [B, H, T, D] on keys of as many heads."""
    bias = None if mask is None else _bias(mask, q.dtype).expand(*q.shape[:3], -1)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, causal, scale=scale)
    out, lse = out.float(), lse[..., : q.shape[2]]  # the kernel gives a multiple of 32
    if mask is not None:
        nothing = ~mask.any(-1)  # [B or 1, 1, T or 1]
        out, lse = out.masked_fill_(nothing.unsqueeze(-1), 0), lse.masked_fill(nothing, -torch.inf)
    return out, lse


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where visible; rows start on 16 bytes, which the kernel needs."""
    L, step = mask.shape[-1], _ALIGN_BYTES // dtype.itemsize
    bias = torch.zeros((*mask.shape[:-1], -(-L // step) * step), dtype=dtype, device=mask.device)
    return bias[..., :L].masked_fill_(~mask, _HIDDEN.get(dtype, -1e30))


def _rows(x: Tensor) -> Tensor:
    """Each row in one piece and on 16 bytes, whatever the order of the other dimensions."""
    steps = (stride * x.element_size() % _ALIGN_BYTES for stride in x.stride()[:-1])
    return x if x.stride(-1) == 1 and not any(steps) else x.contiguous()

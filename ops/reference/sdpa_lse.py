"""Softmax attention over contiguous keys that also returns its log-sum-exp. Shapes: B batch, H heads, T queries, L keys, D head_dim."""

import torch
from torch import Tensor

from . import fused

_TILE = 1 << 26  # score elements held at a time where they are materialised: 256 MiB in f32


def sdpa_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend and keep the normaliser, so that the result can be merged with attention over other keys.

    out = softmax(scale q k^T) v,   lse = log sum exp(scale q k^T)

    Args:
        q: [B, Hq, T, Dk], any float dtype. Computed in f32 (f64 stays f64); on CUDA, 16-bit queries in the dtype of k and v, sums in f32.
        k: [B, Hkv, L, Dk]; Hq is a multiple of Hkv (query head h reads kv head h * Hkv // Hq).
        v: [B, Hkv, L, Dv].
        scale: softmax scale.
        mask: bool, broadcastable to [B, 1, T, L] (the head dimension must be 1); True = visible. k and v must be finite where hidden.
        causal: query t sees keys 0..t; needs T == L and no mask.
        window: with causal, only the last `window` of them, its own included.
        softcap: c of scores c tanh(scale q k^T / c); None = they are not bounded.

    Returns:
        out [B, Hq, T, Dv] f32 and lse [B, Hq, T] f32, natural log. A query that sees nothing gives 0 and -inf.

    Raises: ValueError: causal or window beside a mask, or a window without causal.
    Sync: none. Cost: no score is held on CPU with Dk == Dv and no softcap, nor on CUDA by the kernels of fused.py, which take 16-bit
    queries; elsewhere those of a tile of queries, 256 MiB.
    """
    if mask is not None and (causal or window is not None):
        raise ValueError("sdpa_lse: causal and mask exclude each other; fold causality into the mask")
    if window is not None and not causal:
        raise ValueError("sdpa_lse: a window is counted from each query's own key, so it needs causal=True")
    window = None if window is None or window >= k.shape[2] else window
    path = fused.path_for(q, k, v, masked=mask is not None, softcap=softcap is not None)
    if path == "flash":
        return fused.flash(q, k, v, scale, causal, window)
    if path == "efficient":
        return fused.efficient(q, k, v, scale, mask, causal, window)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    flash = q.device.type == "cpu" and k.shape[-1] == v.shape[-1] and softcap is None
    if flash and window is not None:
        mask, causal = fused.in_order(range(q.shape[2]), k.shape[2], window, q.device), False
    if not flash:
        return _math(q, k, v, scale, mask, causal, window, softcap)
    B, Hq, T, D = q.shape
    group = Hq // k.shape[1]
    if flash and group > 1 and not causal and (mask is None or mask.shape[2] == 1):
        # Every query sees the same keys: the heads that share a kv head become rows of one query, so keys are read once.
        out, lse = _flash_cpu(q.reshape(B, k.shape[1], group * T, D), k, v, scale, mask, causal)
        return out.reshape(B, Hq, T, -1), lse.reshape(B, Hq, T)
    return _flash_cpu(q, k, v, scale, mask, causal)


def _flash_cpu(q, k, v, scale, mask, causal):
    bias = None
    if mask is not None:
        bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
    if mask is not None:
        # The op reports out 0, lse 0 for a query that sees nothing; a merge needs -inf there.
        lse = lse.masked_fill(~mask.any(-1), -torch.inf)
    return out, lse


def _math(q, k, v, scale, mask, causal, window, softcap):
    """Query tiles keep the scores of one tile under _TILE elements; tiles share nothing, so the result does not depend on them."""
    B, Hq, T, _ = q.shape
    L = k.shape[2]
    tile = max(1, _TILE // max(1, B * Hq * L))
    parts = []
    for start in range(0, max(T, 1), tile):
        rows = slice(start, start + tile)
        own = mask if mask is None or mask.shape[2] == 1 else mask[:, :, rows]
        if causal:
            own = fused.in_order(range(T)[rows], L, window, q.device)
        parts.append(_math_tile(q[:, :, rows], k, v, scale, own, softcap))
    if len(parts) == 1:
        return parts[0]
    return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)


def _math_tile(q, k, v, scale, mask, softcap):
    B, Hq, T, _ = q.shape
    Hkv, L = k.shape[1], k.shape[2]
    group = Hq // Hkv
    scores = torch.matmul(q.reshape(B, Hkv, group * T, -1) * scale, k.transpose(-1, -2)).view(B, Hkv, group, T, L)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask.unsqueeze(2), -torch.inf)
    top = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(q.dtype).min)  # keeps exp(-inf - top) at 0 for empty rows
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    lse = (top + total.log()).squeeze(-1)
    weights = weights / total.clamp_min(torch.finfo(q.dtype).tiny)
    out = torch.matmul(weights.view(B, Hkv, group * T, L), v).view(B, Hq, T, -1)
    return out, lse.view(B, Hq, T)

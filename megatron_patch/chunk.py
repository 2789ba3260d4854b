"""Attention of a forward's own tokens, and its merge with what is stored. B rows, T columns, H heads, D head_dim."""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds.cache.cache import Partial
from pikv_ds.ops import add_sink, merge_partials, sdpa_lse


def finish_attention(
    partial: Partial, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None, sink: Tensor | None, padding: Tensor | None
) -> Tensor:
    """Add in-chunk attention to the stored part, then the sink logit, once.

    Args: q [B, T, Hq, D], k and v [B, T, Hkv, D], this forward's own tokens, raw; sink [Hq] or None; padding [B, T] bool or None:
        tokens that nobody sees.
    Returns: [B, T, Hq, D] f32.
    """
    out, lse = partial.out.transpose(1, 2), partial.lse.transpose(1, 2)
    if not partial.includes_self:
        columns = q.shape[1]
        free = padding is None and (window is None or columns <= window)
        mask = None if free else _mask(columns, window or columns, padding, q.device)
        own_out, own_lse = sdpa_lse(*(t.transpose(1, 2) for t in (q, k, v)), scale=scale, mask=mask, causal=mask is None)
        out, lse = (own_out, own_lse) if partial.empty else merge_partials(torch.stack([out, own_out]), torch.stack([lse, own_lse]))
    if sink is not None:
        out = add_sink(out, lse, sink)
    return out.transpose(1, 2)


def _mask(columns: int, window: int, padding: Tensor | None, device: torch.device) -> Tensor:
    """[B or 1, 1, T, T], True = visible."""
    at = torch.arange(columns, device=device)
    back = at.unsqueeze(1) - at
    visible = ((back >= 0) & (back < window))[None, None]
    return visible if padding is None else visible & ~padding[:, None, None]

"""Attention of a forward's own tokens, its merge with what is stored, and the sink logit. B rows, T columns, H heads, D head_dim."""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds.ops import add_sink, merge, sdpa_lse
from pikv_ds.step.query import Partial


def finish(
    partial: Partial,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    window: int | None,
    positions: Tensor | None = None,
    hidden: Tensor | None = None,
    sink: Tensor | None = None,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Add in-chunk attention to the stored part, then the sink logit, once.

    Args:
        partial: attention to what is stored, out [B, T, Hq, Dv] f32.
        q: [B, Hq, T, D]; k, v: [B, Hkv, T, D], this forward's own tokens, raw.
        window: tokens that a query sees, its own included; None = all before it.
        positions: [B, T] of the tokens; None = in order, as their columns are.
        hidden: [B, T] bool, tokens that nobody sees (padding); None = there are none.
        sink: [Hq], a logit that takes a share of the softmax and gives nothing; None = there is none.
        mask: [B or 1, 1, T, T] bool, which of them see which, in place of order and window; None = those before.
        softcap: as for ops.sdpa_lse.

    Returns: [B, T, Hq, Dv] f32.
    """
    out, lse = partial.out.transpose(1, 2), partial.lse.transpose(1, 2)
    if not partial.includes_self:
        in_order = hidden is None and positions is None
        if mask is None and not in_order and (hidden is not None or (window is not None and q.shape[2] > window)):
            mask = visible_in_chunk(q, window, positions, hidden)
        causal = mask is None
        own_out, own_lse = sdpa_lse(q, k, v, scale=scale, mask=mask, causal=causal, window=window if causal else None, softcap=softcap)
        out, lse = (own_out, own_lse) if partial.empty else merge(torch.stack([out, own_out]), torch.stack([lse, own_lse]))
    if sink is not None:
        out = add_sink(out, lse, sink)
    return out.transpose(1, 2)


def visible_in_chunk(q: Tensor, window: int | None, positions: Tensor | None, hidden: Tensor | None) -> Tensor:
    """[B or 1, 1, T, T] bool, which token each query of q [B, Hq, T, D] sees; the others as in `finish`.

    Padding behind tokens of its row sees what the last of them sees.
    """
    at = torch.arange(q.shape[2], device=q.device)[None] if positions is None else positions.cummax(1).values
    query_at, key_at = at.unsqueeze(2), at.unsqueeze(1)
    visible = key_at <= query_at
    if window is not None:
        visible = visible & (key_at > query_at - window)
    if hidden is not None:
        visible = visible & ~hidden.unsqueeze(1)
    return visible.unsqueeze(1)

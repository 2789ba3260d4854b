"""Attention in float64, and how far something is from it. H heads, D head_dim."""

import torch
from torch import Tensor


def rel_error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted, in float64; NaN counts as wrong."""
    error = (got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)
    return float("inf") if bool(error.isnan()) else float(error)


def dense_rows(q: Tensor, at: Tensor, entries: list, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
    """float64 attention of queries q [T, Hq, Dk] at positions [T] to the entries 0, 1, ... of their row: out [T, Hq, Dv], lse [T, Hq]."""
    k, v = (torch.stack(side).double().repeat_interleave(q.shape[1] // entries[0][0].shape[0], 1) for side in zip(*entries, strict=True))
    of, at = torch.arange(len(entries)), at.unsqueeze(1)
    visible = (of <= at) & (of > at - (window or len(entries) + 1))
    scores = (scale * torch.einsum("thd,lhd->thl", q.double(), k)).masked_fill(~visible.unsqueeze(1), -torch.inf)
    return torch.einsum("thl,lhd->thd", scores.softmax(-1), v), scores.logsumexp(-1)


def dense_over(q: Tensor, entries: list, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """float64 attention of one query [Hq, Dk] to these entries: out [Hq, Dv], lse [Hq], weights [Hq, L]."""
    k, v = (torch.stack(side).double().repeat_interleave(q.shape[0] // entries[0][0].shape[0], 1) for side in zip(*entries, strict=True))
    scores = scale * torch.einsum("hd,lhd->hl", q.double(), k)
    weights = scores.softmax(-1)
    return torch.einsum("hl,lhd->hd", weights, v), scores.logsumexp(-1), weights

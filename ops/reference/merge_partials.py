"""Log-sum-exp merge. Shapes: S key sets, any leading dims, D head_dim."""

import torch
from torch import Tensor


def merge_partials(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merge attention over disjoint key sets into attention over their union, in the order of the first dimension.

    out = sum_s exp(lse_s - m) out_s / sum_s exp(lse_s - m),  m = max_s lse_s

    Args:
        out: [S, ..., D] f32 partial outputs, 0 where a set is empty.
        lse: [S, ...] f32, natural log; -inf where a set is empty.

    Returns:
        out [..., D] f32 and lse [...] f32. A row empty in every set gives 0 and -inf.

    Sync: none; graph safe. Source: flashinfer docs/tutorials/recursive_attention.rst (its lse is base 2, ours is natural).
    """
    if out.shape[:-1] != lse.shape:
        raise ValueError(f"merge_partials: out {tuple(out.shape)} and lse {tuple(lse.shape)} differ in a leading dimension")
    top = lse.amax(0).clamp_min(torch.finfo(lse.dtype).min)  # finite also when every set is empty
    weight = torch.exp(lse - top)
    total = weight.sum(0)
    merged = (weight.unsqueeze(-1) * out).sum(0) / total.clamp_min(torch.finfo(lse.dtype).tiny).unsqueeze(-1)
    return merged, top + total.log()


def add_sink(out: Tensor, lse: Tensor, sink: Tensor) -> Tensor:
    """Let a learned sink logit take its share of the softmax: out * exp(lse - logaddexp(lse, sink)).

    Args:
        out: [B, H, T, D] f32, merged over every key set.
        lse: [B, H, T] f32.
        sink: [H], any float dtype, unscaled logit (gpt-oss `sinks`). Apply once, after the last merge, never per shard.

    Sync: none.
    """
    share = torch.exp(lse - torch.logaddexp(lse, sink.to(lse.dtype)[None, :, None]))
    return out * share.unsqueeze(-1)

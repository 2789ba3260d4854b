"""Partial attention results over shards, pools and ranks into one."""

from __future__ import annotations

from torch import Tensor

from .library import OPS


def merge(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merge attention over disjoint key sets into attention over their union, in the order of the first dimension.

    out = sum_s exp(lse_s - m) out_s / sum_s exp(lse_s - m),  m = max_s lse_s

    Args:
        out: [S, ..., D] f32 partial outputs, 0 where a set is empty. Copied if it is not contiguous.
        lse: [S, ...] f32, natural log; -inf where a set is empty. Copied if it is not contiguous.

    Returns:
        out [..., D] f32 and lse [...] f32. A row empty in every set gives 0 and -inf. NaN or +inf in a row's lse gives NaN for both; NaN or
        inf in out stays in its column.

    Sync: none; graph safe. Slow twin: `merge_partials` of ops/reference, in the same steps: products, their sum, divided once.
    """
    return OPS.merge(out.contiguous(), lse.contiguous())

"""Attention of several queries per request to its pages: chunked prefill, speculative decoding."""

from __future__ import annotations

from torch import Tensor

from pikv_ds.ops.format.formats import PageFormat

from .library import OPS


def prefill_cached(
    q: Tensor,
    pages: Tensor,
    fmt: PageFormat,
    block_table: Tensor,
    seqlens: Tensor,
    q_positions: Tensor,
    *,
    scale: float,
    window: int | None = None,
    causal: bool = False,
    tail: Tensor | None = None,
    tail_rows: Tensor | None = None,
    num_splits: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attend from T queries of each request; arguments as in `decode`, with

    Args:
        q: [R, T, Hq, Dk]. q_positions: [R, T] int32.
        causal: see only entries whose stored position <= the query's. Off: everything stored is visible to every query (earlier chunks).

    Returns: out [R, T, Hq, Dv] f32, lse [R, T, Hq] f32, natural log; 0 and -inf where nothing is visible.
    """
    return OPS.prefill_cached(
        q, pages, block_table, seqlens, q_positions, tail, tail_rows, *fmt.layout, scale, window or 0, causal, num_splits
    )

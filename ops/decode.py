"""Attention of one query per request to its pages."""

from __future__ import annotations

from torch import Tensor

from pikv_ds.ops.format.formats import PageFormat

from .library import OPS


def decode(
    q: Tensor,
    pages: Tensor,
    fmt: PageFormat,
    block_table: Tensor,
    seqlens: Tensor,
    *,
    scale: float,
    q_positions: Tensor | None = None,
    window: int | None = None,
    page_list: Tensor | None = None,
    tail: Tensor | None = None,
    tail_rows: Tensor | None = None,
    with_page_lse: bool = False,
    num_splits: int = 0,
    block_size: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Attend to the entries that N = R * S block tables name; the tables r * S ... r * S + S - 1 are the shards of request r.

    out = softmax(scale q k^T) v over all of them,   lse = log sum exp(scale q k^T)

    Args:
        q: [R, Hq, Dk] f32, bf16 or fp16; Hq a multiple of the kv heads H.
        pages: [num_pages, fmt.record_bytes] uint8.
        block_table: [N, 1 or H, max_pages] int32 (int64 is copied); only the columns below seqlens are read. With a head dimension of H
            and fmt.num_kv_heads == 1 each page holds one head of the budget of that head.
        seqlens: [N, 1 or H] int32, entries of each table.
        scale: softmax scale.
        q_positions: [R] int32, needed with a window. window: visible are entries whose stored position > q position - window.
        page_list: [N, 1 or H, num_listed] int32 columns of the table to read, -1 = none; None = all.
        block_size: tokens that page_list and page_lse name as one; 0 = whole pages. Else it divides fmt.page_size, and fmt.group where that
            says how keys are scaled, and a number is column * (fmt.page_size // block_size) + block. Ascending lists are read faster.
        tail: [rows, fmt.num_kv_heads, group, Dk] raw keys of the group that is not full (int8, int4).
        tail_rows: [N] or [N, 1 or H] int32, the tail row of each table.
        with_page_lse: also return the lse of each page, for the mass it holds: exp(page_lse - merged lse).
        num_splits: pieces a table is read in, 0 = chosen; on a CPU by lengths alone, so that no result depends on the number of threads.

    Returns:
        out [R, Hq, Dv] f32, lse [R, Hq] f32 (natural log), page_lse [N, Hq, columns] f32 or None (-inf where a page was not read).
        No visible entry gives 0 and -inf. Slots beyond seqlens and pages not listed are never used: they may hold NaN.

    Sync: none in compiled versions; graph safe there. Cost: reads the pages once.
    """
    out, lse, page_lse = OPS.decode(
        q, pages, block_table, seqlens, q_positions, page_list, tail, tail_rows, *fmt.layout, scale, window or 0, with_page_lse, num_splits,
        block_size,
    )  # fmt: skip
    return out, lse, page_lse if with_page_lse else None

"""How large the attention to a page can be."""

from __future__ import annotations

from torch import Tensor

from pikv_ds.ops.format.formats import PageFormat

from .library import OPS


def page_score(
    q: Tensor,
    bounds: Tensor,
    fmt: PageFormat,
    block_table: Tensor,
    seqlens: Tensor,
    *,
    scale: float,
    width: Tensor | None = None,
    block_size: int = 0,
) -> Tensor:
    """Score every page by the box around its keys, over the query heads of a kv head.

    score = max over heads g of the group: scale sum_d q_gd (hi_d + lo_d) / 2 + width_gd (hi_d - lo_d) / 2

    Without a width, which then is |q|, this is sum_d max(scale q_gd lo_d, scale q_gd hi_d): no logit scale q k of the page exceeds it.

    Args:
        q: [R, Hq, Dk] f32, bf16 or fp16; Hq a multiple of H. Not necessarily those of the model: a mean over a group scores once.
        width: the same shape and dtype; a smaller one than |q| trusts that keys lie near the middle of their box. Needs finite bounds.
        bounds: [num_pages, fmt.num_kv_heads, 2, Dk], int8 with Dk + 2, see `page_bounds`.
        block_table: [N, 1 or H, max_pages] int32 and seqlens [N, 1 or H] int32: as in `decode`, N = R * S.
        scale: softmax scale.
        block_size: 0, or that of `page_bounds`, and block_table then names blocks: page * blocks + block.

    Returns:
        [N, H, max_pages] f32; -inf for columns beyond seqlens. `torch.topk` of it, as int32 columns, is a page_list of `decode`;
        .amax(1, keepdim=True) first gives one list for all heads.

    Sync: none in compiled versions. Cost: reads the bounds of the pages in use once.
    Source: Quest, arXiv 2406.10774.
    """
    return OPS.page_score(q, bounds, block_table, seqlens, width, block_size or fmt.page_size, scale)

"""How large the attention to a page can be at most."""

from __future__ import annotations

from torch import Tensor

from .formats import PageFormat
from .library import OPS


def page_score(q: Tensor, bounds: Tensor, fmt: PageFormat, block_table: Tensor, seqlens: Tensor, *, scale: float) -> Tensor:
    """Upper bound of the logits scale q k of every page, over the query heads of a kv head.

    score = max over heads g of the group: sum_d max(scale q_gd lo_d, scale q_gd hi_d)

    Args:
        q: [R, Hq, Dk] f32, bf16 or fp16.
        bounds: [num_pages, fmt.num_kv_heads, 2, Dk], see `page_bounds`.
        block_table: [N, 1 or H, max_pages] int32 and seqlens [N, 1 or H] int32: as in `decode`, N = R * S.
        scale: softmax scale.

    Returns:
        [N, H, max_pages] f32; -inf for columns beyond seqlens. `torch.topk` of it, as int32 columns, is a page_list of `decode`;
        .amax(1, keepdim=True) first gives one list for all heads.

    Sync: none in compiled versions. Cost: reads the bounds of the pages in use once.
    Source: Quest, arXiv 2406.10774.
    """
    return OPS.page_score(q, bounds, block_table, seqlens, fmt.page_size, scale)

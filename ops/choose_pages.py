"""The pages, or blocks of pages, that a query reads."""

from __future__ import annotations

from torch import Tensor

from .library import OPS


def choose_pages(score: Tensor, hidden: Tensor, pinned: Tensor, budget: Tensor | None, width: int) -> Tensor:
    """The columns of the highest scores, all pinned ones among them.

    Args:
        score: [Q, H, C] f32, below +inf. -inf: not chosen.
        hidden, pinned: [Q, C] bool. Hidden: not chosen; pinned, and not hidden: chosen whatever its score.
        budget: [Q] int64 columns that a query gets, pinned ones included and no fewer than these, at least 1; None = width.
        width: the most that any query gets; it holds what is pinned.

    Returns: [Q, H, min(width, C)] int32 ascending, then -1: a page_list of `decode`. Of equal scores the lower columns are taken.

    Sync: none. Cost: reads the scores twice; nothing is sorted on the CPU.
    """
    return OPS.choose_pages(score, hidden, pinned, budget, width)

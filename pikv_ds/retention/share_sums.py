"""Shares of attention from lse: of pages, and of the entries of a chunk.

R rows, T queries per row, b of them at a time, Hq query heads, S local shards, C columns of a block table, H head tables.
"""

from __future__ import annotations

import torch
from torch import Tensor


def share_inside(
    q: Tensor, k: Tensor, scale: float, positions: Tensor, valid: Tensor, block: Tensor, lse: Tensor | None, num_tables: int
) -> tuple[Tensor, Tensor]:
    """Attention of a block of a chunk's queries to the chunk's own entries, which dense attention does not report.

    Args: q [R, T, Hq, Dk], k [R, T, Hkv, Dk]; positions, valid [R, T]; block [R, b] columns of the queries; lse [R, b, Hq] over stored
        entries, or None; num_tables: H.
    Returns: shares [R, T, H, b] f32, mean over the query heads of a table, and lse [R, b, Hq] over stored and own entries.
    """
    q = take(q, block)
    score = scale * torch.einsum("rbhgd,rthd->rbhgt", q.float().unflatten(2, (k.shape[2], -1)), k.float()).flatten(2, 3)
    visible = valid.unsqueeze(1) & (positions.unsqueeze(1) <= positions.gather(1, block).unsqueeze(2))
    score = torch.where(visible.unsqueeze(2), score, -torch.inf)
    total = score.logsumexp(-1)
    total = total if lse is None else torch.logaddexp(total, lse)
    share = torch.where(visible.unsqueeze(2), torch.exp(score - total.unsqueeze(-1)), 0).unflatten(2, (num_tables, -1)).mean(3)
    return torch.where(valid.gather(1, block)[..., None, None], share, 0).permute(0, 3, 2, 1), total


def share_of_pages(page_lse: Tensor, total: Tensor, real: Tensor, num_tables: int) -> Tensor:
    """[R, b, S, Hq, C] lse of pages and [R, b, Hq] of everything -> shares [R * S * H * C, b], mean over heads; real [R, b]."""
    share = torch.exp(page_lse - total[:, :, None, :, None])
    share = torch.where(torch.isneginf(page_lse) | ~real[:, :, None, None, None], 0, share)
    share = share.unflatten(3, (num_tables, -1)).mean(4)  # [R, b, S, H, C]
    return share.permute(0, 2, 3, 4, 1).flatten(0, 3)


def take(x: Tensor | None, block: Tensor) -> Tensor | None:
    """Columns `block` [R, b] of x [R, T, ...]."""
    if x is None or x.shape[1] == 1:
        return x
    return x.gather(1, block.view(*block.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:]))

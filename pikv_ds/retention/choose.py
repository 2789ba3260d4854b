"""Which pages leave, from the scores of all of them. Pure tensor functions.

L layers, R request rows, S shards of all ranks, C columns of a block table.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Candidates(NamedTuple):
    """The pages of all shards in shard order, so that every rank sees the same."""

    score: Tensor
    """[L, R, S, C] f32, +inf = pinned, or no page."""
    last_position: Tensor
    """[L, R, S, C] int32."""
    hit: Tensor
    """[L, R, S, C] bool, used since the last eviction and not pinned; for an adaptive threshold."""


def choose(pages: Candidates, num_pages: Tensor, threshold: Tensor | None = None, *, sum_layers: bool = False) -> Tensor:
    """The `num_pages` [L, R] lowest scores of every row, over all shards; among equal ones the oldest page goes first.

    Args:
        threshold: [L, R] f32, pages that score below it go as well. sum_layers: layers hold the same pages and score them together.

    Returns: [L, R, S, C] bool. Pinned pages are never chosen. Sync: none.
    """
    score, last = pages.score.flatten(2), pages.last_position.flatten(2)
    if sum_layers:
        score = score.sum(0, keepdim=True).expand_as(score)
    by_age = last.argsort(dim=-1, stable=True)
    order = by_age.gather(-1, score.gather(-1, by_age).argsort(dim=-1, stable=True))
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order).contiguous())
    gone = rank < num_pages.unsqueeze(-1)
    if threshold is not None:
        gone |= score < threshold.unsqueeze(-1)
    return (gone & (score < torch.inf)).view_as(pages.score)


def protect(score: Tensor, last_position: Tensor, num_pages: Tensor) -> Tensor:
    """+inf for the `num_pages` [R] best pages of every row, over all shards; among equal ones the latest. Both [R, S, C]; -1 = no page."""
    value, last = torch.where(last_position >= 0, score, -torch.inf).flatten(1), last_position.flatten(1)
    by_age = last.argsort(dim=-1, descending=True, stable=True)
    order = by_age.gather(-1, value.gather(-1, by_age).argsort(dim=-1, descending=True, stable=True))
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order).contiguous())
    return torch.where((rank < num_pages.to(rank.device).unsqueeze(-1)).view_as(score), torch.inf, score)

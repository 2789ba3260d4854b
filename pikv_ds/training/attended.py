"""What a frozen model's attention gives to pages: the target of gates, and what a choice of pages holds of it.

Q queries, H kv heads, G query heads of each, D key width, T tokens, P entries of a page, C full pages.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .recorded import LayerWindow


class Attended(NamedTuple):
    """Of queries of one layer at positions `at`, and the C full pages of its window."""

    q: Tensor
    """[Q, H, G, D] f32, times the softmax scale."""
    keys: Tensor
    """[C * P, H, D] f32."""
    mass: Tensor
    """[Q, H, C]: attention of the query's heads to each page, their mean; entries that a query does not see have none."""
    visible: Tensor
    """[Q, C] bool: the page has entries that the query sees."""
    whole: Tensor
    """[Q, C] bool: it sees all of the page's entries."""
    pinned: Tensor
    """[Q, C] bool: every query reads it, whatever its score."""

    @property
    def open(self) -> Tensor:
        """[Q, 1, C] bool: a gate decides; it knows pages with entries that the query does not see by all of their entries."""
        return (self.whole & ~self.pinned).unsqueeze(1)


def attended(layer: LayerWindow, at: Tensor, page_size: int, sinks: int, recent: int) -> Attended:
    """at [Q] int64 positions. sinks and recent: tokens that are always read. No gradients."""
    with torch.no_grad():
        at, heads = at.to(layer.k.device), layer.k.shape[1]
        q = layer.scale * layer.q[at].float().unflatten(1, (heads, -1))
        count = layer.k.shape[0] // page_size
        position = torch.arange(layer.k.shape[0], device=at.device)
        logits = torch.einsum("qhgd,thd->qhgt", q, layer.k.float())
        logits = logits if layer.softcap is None else layer.softcap * torch.tanh(logits / layer.softcap)
        behind = at.unsqueeze(1) - position
        seen = (behind >= 0) if layer.window is None else (behind >= 0) & (behind < layer.window)
        share = logits.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1).mean(2)
        by_page = lambda x: x[..., : count * page_size].unflatten(-1, (count, page_size))  # noqa: E731
        pinned = by_page(seen & ((position < sinks) | (behind < recent))).any(-1)
        return Attended(
            q, layer.k[: count * page_size].float(), by_page(share).sum(-1), by_page(seen).any(-1), by_page(seen).all(-1), pinned
        )


def chosen(score: Tensor, seen: Attended, at: Tensor, ratio: float, page_size: int) -> Tensor:
    """score [Q, H, C] -> [Q, H, C] bool: pinned pages and the best others, ceil(ratio * pages so far) in all if pinned are fewer."""
    score = score.masked_fill(seen.pinned.unsqueeze(1), torch.inf).masked_fill(~seen.visible.unsqueeze(1), -torch.inf)
    budget = ((at.to(score.device) + 1) * ratio / page_size).ceil().to(torch.int64)
    budget = torch.maximum(budget, seen.pinned.sum(-1)).clamp_min(1)
    rank = score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return (rank < budget[:, None, None]) & seen.visible.unsqueeze(1)


def positions(length: int, question: Tensor, count: int, first: int, generator: torch.Generator) -> Tensor:
    """[Q] int64: `count` positions from `first` on, drawn without repetition; of a window that asks, a quarter where it asks."""
    asking = torch.nonzero(question).flatten().cpu()
    asked = asking[torch.randperm(len(asking), generator=generator)[: count // 4]]
    drawn = first + torch.randperm(length - first, generator=generator)[: count - len(asked)]
    return torch.cat([asked, drawn])

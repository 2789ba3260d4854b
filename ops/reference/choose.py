"""The best columns of each query, torch reference."""

from __future__ import annotations

import torch
from torch import Tensor

_PINNED, _HIDDEN = 0x7F800000, ~0x7F800000  # the keys of +inf and -inf


def choose_pages(score: Tensor, hidden: Tensor, pinned: Tensor, budget: Tensor | None, width: int) -> Tensor:
    """The arguments are those of ops/choose_pages.py. Sync: none."""
    columns = score.shape[2]
    bits = score.masked_fill(pinned.unsqueeze(1), torch.inf).masked_fill_(hidden.unsqueeze(1), -torch.inf).view(torch.int32).long()
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # ascends with the float
    order = torch.arange(columns, device=score.device)
    key, index = (key << 32 | (0x7FFFFFFF - order)).topk(min(width, columns))  # of equal scores the lower column
    key >>= 32
    chosen = key > _HIDDEN
    if budget is not None:
        wanted = torch.maximum(budget.view(-1, 1), (key == _PINNED).sum(-1)).clamp_min(1)
        chosen &= torch.arange(key.shape[-1], device=score.device) < wanted.unsqueeze(-1)
    found = torch.where(chosen, index, columns).sort(-1).values
    return torch.where(found < columns, found, -1).to(torch.int32)

"""A plan as slots [L, G, n] int64, the expert of every slot: what it asks of the ranks, and how two of them differ. Pure tensor functions.

L layers, E experts, G ranks of n slots each. A rank that has an expert in two slots holds it once.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rank_loads(loads: Tensor, slots: Tensor) -> Tensor:
    """[L, G] float64: the load of every rank under a plan. loads [L, E]."""
    ordered = slots.sort(2).values
    counts = torch.ones_like(ordered, dtype=torch.float64)
    counts[:, :, 1:] = ordered[:, :, 1:] != ordered[:, :, :-1]
    copies = torch.zeros(loads.shape, dtype=torch.float64).scatter_add_(1, ordered.flatten(1), counts.flatten(1))
    each = (loads.to(torch.float64) / copies).gather(1, ordered.flatten(1)).view_as(counts)
    return (each * counts).sum(2)


def peak_over_mean(loads: Tensor, slots: Tensor) -> Tensor:
    """[L] float64, 1 = even; a layer without load is even."""
    per_rank = rank_loads(loads, slots)
    mean = per_rank.mean(1)
    return torch.where(mean > 0, per_rank.amax(1) / mean, 1.0)


def moved(present: Tensor, slots: Tensor, num_experts: int) -> Tensor:
    """[L, E, G] bool: a rank must be sent an expert that it does not hold now."""
    return held(slots, num_experts) & ~held(present, num_experts)


def holders(slots: Tensor, num_experts: int) -> Tensor:
    """[L, E, R] int64: the ranks that hold an expert, ascending, -1 behind the last; R is the largest number of copies."""
    found = held(slots, num_experts)
    most, num_ranks = int(found.sum(2).max()), found.shape[2]
    ranks = torch.where(found, torch.arange(num_ranks), num_ranks).sort(2).values[..., :most]
    return torch.where(ranks == num_ranks, -1, ranks)


def blocks(num_layers: int, num_experts: int, num_ranks: int) -> Tensor:
    """Slots of neighbouring experts on a rank: how hosts begin."""
    return torch.arange(num_experts).view(1, num_ranks, -1).repeat(num_layers, 1, 1)


def held(slots: Tensor, num_experts: int) -> Tensor:
    """[L, E, G] bool: which rank holds which expert."""
    found = torch.zeros(slots.shape[0], num_experts, slots.shape[1], dtype=torch.bool)
    rank = torch.arange(slots.shape[1])[None, :, None].expand_as(slots)
    found[torch.arange(len(slots))[:, None, None].expand_as(slots), slots, rank] = True
    return found


def heaviest(loads: Tensor, slots: Tensor) -> Tensor:
    """[L] float64: the load of the heaviest rank."""
    return rank_loads(loads, slots).amax(1)


def count_moves(present: Tensor, slots: Tensor, num_experts: int) -> Tensor:
    """[L] int64: experts that some rank must be sent."""
    return moved(present, slots, num_experts).sum((1, 2))

"""Where an entry lives: expert id and position -> shard -> rank. Pure tensor functions. T tokens, E experts, S shards, G ranks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .rules import PLACEMENTS
from .rules.base import Facts


def primary_expert(expert_ids: Tensor, weights: Tensor) -> Tensor:
    """Reduce a top-k routing decision to one expert: largest weight, lowest id on ties.

    Args:
        expert_ids: [T, K] int, in any order (routers use topk(sorted=False): column 0 is not the top-1).
        weights: [T, K] float, the routing weights of those experts.

    Returns: [T] int64. Sync: none.
    """
    best = weights == weights.amax(-1, keepdim=True)
    return torch.where(best, expert_ids, torch.iinfo(expert_ids.dtype).max).amin(-1).to(torch.int64)


class Routed(NamedTuple):
    """A router's decision, not yet reduced to one expert per token: ids [T, K] int, weights [T, K] float."""

    ids: Tensor
    weights: Tensor

    def primary(self) -> Tensor:
        """[T] int64, see primary_expert."""
        return primary_expert(self.ids.detach(), self.weights.detach())


class Hashed(NamedTuple):
    """Entries whose expert is their position modulo E, not computed yet: positions [T] int32."""

    positions: Tensor
    num_experts: int

    def primary(self) -> Tensor:
        """[T] int64."""
        return hash_expert(self.positions, self.num_experts)


def hash_expert(positions: Tensor, num_experts: int) -> Tensor:
    """position mod E: the expert id of an entry whose layer has no earlier router. [T] -> [T] int64."""
    return positions.to(torch.int64) % num_experts


class Placement:
    """Maps (expert id, position) to a shard for every layer, by the rule that storage.placement names (pikv_ds/placement/rules)."""

    def __init__(self, method: str, num_experts: int, num_shards: int, *, n_tok: int = 1, table: list | None = None) -> None:
        """Raises: ValueError for a table of another model."""
        self.num_experts, self.num_shards = num_experts, num_shards
        self.rule = PLACEMENTS.get(method)(Facts(num_experts, num_shards, n_tok, table))

    def to(self, device: torch.device) -> Placement:
        self.rule.to(device)
        return self

    def shard_of(self, layer_idx: int, expert_ids: Tensor, positions: Tensor) -> Tensor:
        """[T] int64 expert ids in [0, E), [T] int positions >= 0 -> [T] int64 shards. Sync: none."""
        return self.rule.shard_of(layer_idx, expert_ids, positions)

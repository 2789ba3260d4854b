"""Where an entry lives: expert id and position -> shard -> rank. Pure tensor functions. T tokens, E experts, S shards, G ranks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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


def hash_expert(positions: Tensor, num_experts: int) -> Tensor:
    """position mod E: the expert id of an entry whose layer has no earlier router. [T] -> [T] int64."""
    return positions.to(torch.int64) % num_experts


class Placement:
    """Maps (expert id, position) to a shard for every layer. Owns one small lookup table; no process group, no state.

    Methods:
        experts: shard = floor(e S / E), the contiguous placement of AutoEP and Megatron local_expert_indices.
        xor: (t mod n_tok) xor (e mod E'), E' the next power of two >= E, then mod S (PiKV paper, section 3.1).
        position: t mod S.
        table: explicit [num_layers or 1, E, max_replicas] shard ids, -1 unused; an expert with several shards spreads its entries
            over them by position, each entry stored once.
    """

    def __init__(self, method: str, num_experts: int, num_shards: int, *, n_tok: int = 1, table: list | None = None) -> None:
        self.method = method
        self.num_experts = num_experts
        self.num_shards = num_shards
        self.n_tok = n_tok
        self.expert_mask = (1 << max(num_experts - 1, 0).bit_length()) - 1
        self.table: Tensor | None = None
        if method == "table":
            self.table = _checked_table(table or [], num_experts, num_shards)
        elif method == "experts":
            self.table = (torch.arange(num_experts) * num_shards // num_experts).view(1, -1, 1)
        self.replicas = None if self.table is None else (self.table >= 0).sum(-1)  # [layers or 1, E]

    def to(self, device: torch.device) -> Placement:
        if self.table is not None and self.replicas is not None:
            self.table, self.replicas = self.table.to(device), self.replicas.to(device)
        return self

    def shard_of(self, layer_idx: int, expert_ids: Tensor, positions: Tensor) -> Tensor:
        """[T] int64 expert ids in [0, E), [T] int positions >= 0 -> [T] int64 shards. Sync: none."""
        if self.method == "position":
            return positions.to(torch.int64) % self.num_shards
        if self.method == "xor":
            return ((positions.to(torch.int64) % self.n_tok) ^ (expert_ids & self.expert_mask)) % self.num_shards
        assert self.table is not None and self.replicas is not None, self.method
        layer = layer_idx if self.table.shape[0] > 1 else 0
        if self.table.shape[-1] == 1:
            return self.table[layer, :, 0][expert_ids]
        return self.table[layer][expert_ids, positions % self.replicas[layer][expert_ids]]


def _checked_table(table: list, num_experts: int, num_shards: int) -> Tensor:
    try:
        t = torch.tensor(table, dtype=torch.int64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"pikv.storage.table must be a full nested list [layers][experts][replicas] of shard ids: {error}") from error
    if t.dim() != 3 or t.shape[1] != num_experts:
        raise ValueError(
            f"pikv.storage.table has shape {list(t.shape)}; this model needs [num_layers or 1, {num_experts} experts, max_replicas]"
        )
    if int(t.max()) >= num_shards:
        raise ValueError(f"pikv.storage.table names shard {int(t.max())}, but there are {num_shards} shards (0..{num_shards - 1})")
    used = t >= 0
    if not bool(used[..., 0].all()) or bool((used[..., 1:] & ~used[..., :-1]).any()):
        raise ValueError("pikv.storage.table: each expert needs a shard in its first column, and -1 only after the last replica")
    return t

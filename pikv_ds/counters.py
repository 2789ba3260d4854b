"""Entry counters of one rank: device tensors, added to in place, read when somebody asks."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import CapacityError


class Counters:
    """appended + forked = live + expired + evicted + cropped, summed over the ranks of the group; forked is 0 without beam search."""

    def __init__(self, num_experts: int, device: torch.device) -> None:
        self.by_expert = torch.zeros(num_experts, dtype=torch.int64, device=device)  # entries appended here, by primary expert
        self.device_counts = torch.zeros(3, dtype=torch.int64, device=device)  # expired at birth, spilled to here, spilled anywhere
        self.clear()

    def clear(self) -> None:
        self.by_expert.zero_()
        self.device_counts.zero_()
        self.expired = 0
        self.evicted = 0
        self.cropped = 0
        self.forked = 0  # entries that beam forks added to this rank's tables, less those they dropped; sums to 0 over the ranks

    def count_appended(self, experts: Tensor, stored: Tensor) -> None:
        self.by_expert.index_add_(0, experts, stored.to(torch.int64))

    def expire_at_birth(self, unseen: Tensor, experts: Tensor) -> None:
        """Tokens of a chunk longer than the window: appended and expired in one, at the home they would have had."""
        unseen = unseen.to(torch.int64)
        self.by_expert.index_add_(0, experts, unseen)
        self.device_counts[0] += unseen.sum()

    def count_spilled(self, over: Tensor, here: Tensor) -> None:
        self.device_counts[1] += here.sum()
        self.device_counts[2] += over.sum()

    def raise_if_overflowed(self, capacity: list[int]) -> None:
        spilled = int(self.device_counts[2])
        if spilled:
            raise CapacityError(
                f"{spilled} entries did not fit into the shard of their expert (pikv.storage.capacity_tokens: {max(capacity)} entries per "
                f"layer and shard) and pikv.storage.overflow = 'error'; raise capacity_tokens, or set overflow = 'spill'"
            )

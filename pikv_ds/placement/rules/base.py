"""A placement rule: expert id and position -> shard. T tokens, E experts, S shards."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor


class Facts(NamedTuple):
    """What a rule is built from: the model's experts, the shards, and the keys of the "storage" block that rules may read."""

    num_experts: int
    num_shards: int
    n_tok: int = 1
    table: list | None = None


class PlacementRule(ABC):
    """The same on every rank. Owns small look-up tables at most; no process group, no state."""

    name: ClassVar[str]
    reads_experts: ClassVar[bool] = True
    """False: only positions matter, so it is the same whatever a model's routers choose."""
    alike_in_layers: ClassVar[bool] = False
    """True: an entry has the same shard in all layers, so that pages of a shard hold the same entries."""

    def __init__(self, facts: Facts) -> None:
        """Raises: ValueError for a model or a number of shards that the rule can't place."""
        self.facts = facts

    def to(self, device: torch.device) -> None:  # noqa: B027
        """Move the tables to a device."""

    @abstractmethod
    def shard_of(self, layer_idx: int, expert_ids: Tensor, positions: Tensor) -> Tensor:
        """[T] int64 expert ids in [0, E), [T] int positions >= 0 -> [T] int64 shards. Sync: none."""

import torch
from torch import Tensor

from . import PLACEMENTS
from .base import PlacementRule


@PLACEMENTS.register("position")
class ByPosition(PlacementRule):
    """shard = t mod S."""

    reads_experts = False
    alike_in_layers = True

    def shard_of(self, layer_idx: int, expert_ids: Tensor, positions: Tensor) -> Tensor:
        return positions.to(torch.int64) % self.facts.num_shards

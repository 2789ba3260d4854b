import torch
from torch import Tensor

from . import PLACEMENTS
from .base import Facts, PlacementRule


@PLACEMENTS.register("table")
class ByTable(PlacementRule):
    """shard = an explicit table [num_layers or 1, E, max_replicas] of shard ids, -1 unused (`storage.table`).

    An expert with several shards spreads its entries over them by position, each entry stored once.
    """

    def __init__(self, facts: Facts) -> None:
        super().__init__(facts)
        self.table = self.made(facts)
        self.replicas = (self.table >= 0).sum(-1)  # [layers or 1, E]

    def made(self, facts: Facts) -> Tensor:
        """[layers or 1, E, max_replicas] int64."""
        return _checked(facts)

    def to(self, device: torch.device) -> None:
        self.table, self.replicas = self.table.to(device), self.replicas.to(device)

    def shard_of(self, layer_idx: int, expert_ids: Tensor, positions: Tensor) -> Tensor:
        layer = layer_idx if self.table.shape[0] > 1 else 0
        if self.table.shape[-1] == 1:
            return self.table[layer, :, 0][expert_ids]
        return self.table[layer][expert_ids, positions % self.replicas[layer][expert_ids]]


def _checked(facts: Facts) -> Tensor:
    try:
        t = torch.tensor(facts.table or [], dtype=torch.int64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"pikv.storage.table must be a full nested list [layers][experts][replicas] of shard ids: {error}") from error
    if t.dim() != 3 or t.shape[1] != facts.num_experts:
        raise ValueError(
            f"pikv.storage.table has shape {list(t.shape)}; this model needs [num_layers or 1, {facts.num_experts} experts, max_replicas]"
        )
    if int(t.max()) >= facts.num_shards:
        raise ValueError(
            f"pikv.storage.table names shard {int(t.max())}, but there are {facts.num_shards} shards (0..{facts.num_shards - 1})"
        )
    used = t >= 0
    if not bool(used[..., 0].all()) or bool((used[..., 1:] & ~used[..., :-1]).any()):
        raise ValueError("pikv.storage.table: each expert needs a shard in its first column, and -1 only after the last replica")
    return t

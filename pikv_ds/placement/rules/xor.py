import torch
from torch import Tensor

from . import PLACEMENTS
from .base import Facts, PlacementRule


@PLACEMENTS.register("xor")
class Xor(PlacementRule):
    """shard = ((t mod n_tok) xor (e mod E')) mod S, E' the next power of two >= E.

    Source: PiKV, arXiv 2508.06526, section 3.1.
    """

    def __init__(self, facts: Facts) -> None:
        super().__init__(facts)
        self.expert_mask = (1 << max(facts.num_experts - 1, 0).bit_length()) - 1

    def shard_of(self, layer_idx: int, expert_ids: Tensor, positions: Tensor) -> Tensor:
        n_tok, num_shards = self.facts.n_tok, self.facts.num_shards
        return ((positions.to(torch.int64) % n_tok) ^ (expert_ids & self.expert_mask)) % num_shards

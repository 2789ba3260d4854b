import torch
from torch import Tensor

from . import PLACEMENTS
from .base import Facts
from .table import ByTable


@PLACEMENTS.register("experts")
class ByExpert(ByTable):
    """shard = floor(e S / E): the contiguous placement of AutoEP and of Megatron's local_expert_indices, so that KV follows its expert."""

    def made(self, facts: Facts) -> Tensor:
        return (torch.arange(facts.num_experts) * facts.num_shards // facts.num_experts).view(1, -1, 1)

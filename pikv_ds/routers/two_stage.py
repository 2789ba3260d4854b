import torch
from torch import Tensor

from pikv_ds.routers import ROUTERS
from pikv_ds.routers.base import PageQuery
from pikv_ds.routers.shard_router import ShardRouter


@ROUTERS.register("two_stage")
class TwoStage(ShardRouter):
    """First the groups of neighbouring shards, then the top-k shards inside these: the paper's R_H, hierarchical.

    g_group = mean of scale q mu_s over the group's entries; the top_groups groups stay, and of their shards the top_k by scale q mu_s.
    Source: PiKV, arXiv 2508.06526, table 1.
    """

    def __init__(self, *, top_k: int = 1, group_size: int = 2, top_groups: int = 1) -> None:
        if group_size < 1 or top_groups < 1:
            raise ValueError(f"group_size and top_groups of at least 1, got {group_size} and {top_groups}")
        super().__init__(top_k=top_k)
        self.group_size, self.top_groups = group_size, top_groups

    def logits(self, asked: PageQuery) -> Tensor:
        logits = self.mean_logits(asked.q, asked)
        num_shards = logits.shape[1]
        group = torch.arange(num_shards, device=logits.device) // self.group_size
        weight = self.counts[asked.layer].value[asked.row_of_query()]
        total = logits.new_zeros(logits.shape[0], -(-num_shards // self.group_size))
        entries = total.index_add(1, group, weight)
        total.index_add_(1, group, logits.nan_to_num(neginf=0.0) * weight)
        mean = (total / entries.clamp_min(1)).masked_fill(entries == 0, -torch.inf)
        best = mean.sort(dim=-1, descending=True, stable=True).indices[:, : self.top_groups]
        kept = (best.unsqueeze(-1) == group).any(1)
        return logits.masked_fill(~kept, -torch.inf)

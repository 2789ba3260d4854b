import torch
from torch import Tensor

from pikv_ds.routers import ROUTERS
from pikv_ds.routers.base import PageQuery
from pikv_ds.routers.shard_router import ShardRouter


@ROUTERS.register("experts")
class ExpertShard(ShardRouter):
    """The shard that stores the query's own token: entries of its expert (the paper's premise, y = Attention(q, C[g])).

    Reads one shard per query. Expert ids barely predict where attention goes; this router is here to measure that.
    Source: PiKV, arXiv 2508.06526, section 2.
    """

    needs_experts = True

    def __init__(self) -> None:
        super().__init__(top_k=1)

    def logits(self, asked: PageQuery) -> Tensor:
        num_shards = self.counts[asked.layer].value.shape[1]
        if asked.homes is None:
            return torch.zeros(len(asked.positions), 1, dtype=torch.float32, device=asked.q.device)
        row = asked.row_of_query() - asked.rows.start
        own = asked.homes[row, asked.positions.clamp_min(0).long()].long()
        return torch.where(own.unsqueeze(1) == torch.arange(num_shards, device=own.device), 0.0, -torch.inf)

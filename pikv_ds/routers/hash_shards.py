import torch
from torch import Tensor

from pikv_ds.routers import ROUTERS
from pikv_ds.routers.base import PageQuery
from pikv_ds.routers.scramble import scramble
from pikv_ds.routers.shard_router import ShardRouter


@ROUTERS.register("hash")
class HashShards(ShardRouter):
    """Shards by a hash of the query's position (the paper's R_B): asks nothing of query or keys.

    Reads shards h, h + 1, ..., h + top_k - 1 modulo S, h = hash(position, layer) mod S.
    Source: PiKV, arXiv 2508.06526, table 1.
    """

    def logits(self, asked: PageQuery) -> Tensor:
        num_shards = self.counts[asked.layer].value.shape[1]
        start = scramble(asked.positions, asked.layer) % num_shards
        shard = torch.arange(num_shards, device=start.device)
        return -((shard - start.unsqueeze(1)) % num_shards).float()

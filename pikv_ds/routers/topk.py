from torch import Tensor

from pikv_ds.routers import ROUTERS
from pikv_ds.routers.base import PageQuery
from pikv_ds.routers.shard_router import ShardRouter


@ROUTERS.register("topk")
class TopKShards(ShardRouter):
    """The shards whose mean key the query matches best (the paper's R_T, top-k softmax).

    g_s = scale q mu_s, mean over heads, mu_s = mean key of the request's entries in shard s; the top_k highest are read whole.
    Source: PiKV, arXiv 2508.06526, table 1; softmax keeps the order, so it is left out.
    """

    def logits(self, asked: PageQuery) -> Tensor:
        return self.mean_logits(asked.q, asked)

from torch import Tensor

from pikv_ds.routers import ROUTERS
from pikv_ds.routers.base import PageQuery
from pikv_ds.routers.shard_router import ShardRouter


@ROUTERS.register("expected_mass")
class ExpectedMass(ShardRouter):
    """The shards that hold most of the attention, if every key were the mean of its shard.

    g_s = scale q mu_s + log n_s, mean over heads; mu_s and n_s: mean and number of the keys of the request that shard s ever stored. The
    top_k highest are read whole. A small shard needs a better match than a large one.
    Source: ours; `topk` (PiKV, arXiv 2508.06526, table 1) with the number of keys taken into account.
    """

    def logits(self, asked: PageQuery) -> Tensor:
        counts = self.counts[asked.layer].value[asked.row_of_query()]  # [Q, S]
        return self.mean_logits(asked.q, asked) + counts.log()  # an empty shard has -inf already

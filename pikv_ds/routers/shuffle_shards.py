from torch import Tensor

from pikv_ds.routers import ROUTERS
from pikv_ds.routers.base import PageQuery
from pikv_ds.routers.earlier import EarlierQueries
from pikv_ds.routers.shard_router import ShardRouter
from pikv_ds.store import LayerStore


@ROUTERS.register("shuffle_shards")
class ShuffleShards(ShardRouter):
    """Control for shard routers: `topk` asked with the query of another position of the request, so that shards keep their popularity.

    g_s = scale q' mu_s, q' drawn from the latest 128 queries of the row. What `topk` holds more of the attention, it owes to the query.
    """

    def __init__(self, *, top_k: int = 1) -> None:
        super().__init__(top_k=top_k)
        self.earlier = EarlierQueries()

    def open(self, layer: int, store: LayerStore, num_shards: int) -> None:
        super().open(layer, store, num_shards)
        self.earlier.open(layer)

    def remap(self, layer: int, parent: Tensor) -> None:
        super().remap(layer, parent)
        self.earlier.remap(layer, parent)

    def logits(self, asked: PageQuery) -> Tensor:
        return self.mean_logits(self.earlier.swap(asked), asked)

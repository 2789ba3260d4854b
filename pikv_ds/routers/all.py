import torch
from torch import Tensor

from pikv_ds.routers import ROUTERS
from pikv_ds.routers.base import Router


@ROUTERS.register("all")
class AllShards(Router):
    """Every query reads every shard (exact mode).

    route(q, s) = true for each shard s. Entries read per query and layer: all that are stored.
    """

    reads_all = True

    def route(self, q: Tensor, summary: Tensor) -> Tensor:
        return torch.ones(q.shape[0], summary.shape[0], dtype=torch.bool, device=q.device)

import torch
from torch import Tensor

from pikv_ds.pages.pool import PagePool
from pikv_ds.pages.rows import RowColumn, Rows
from pikv_ds.routers import ROUTERS
from pikv_ds.routers.base import PageQuery
from pikv_ds.routers.shard_router import ShardRouter


@ROUTERS.register("load_balanced")
class LoadBalanced(ShardRouter):
    """Top-k shards with a penalty on those that many queries read lately (the paper's R_LB).

    g_s = scale q mu_s - alpha (load_s - mean load), load_s = running share of the request's queries that read shard s (mu_e in the paper),
    per layer: load <- (1 - 1/window) load + share / window after every forward of up to 32 queries, longer ones in such parts. What other
    requests read does not count: shards that each reads evenly are read evenly by all.
    Source: PiKV, arXiv 2508.06526, table 1.
    """

    remembers_queries = True

    def __init__(self, *, top_k: int = 1, alpha: float = 1.0, window: int = 16) -> None:
        if alpha < 0 or window < 1:
            raise ValueError(f"alpha >= 0 and window >= 1, got {alpha} and {window}")
        super().__init__(top_k=top_k)
        self.alpha, self.window = alpha, window
        self.load: dict[int, RowColumn] = {}  # layer -> [R, S] f32

    def open(self, layer: int, pool: PagePool, num_shards: int, rows: Rows) -> None:
        super().open(layer, pool, num_shards, rows)
        self.load[layer] = rows.tensor(f"{layer}.load", (num_shards,), empties=True)

    def logits(self, asked: PageQuery) -> Tensor:
        load = self.load[asked.layer].value[asked.row_of_query()]
        return self.mean_logits(asked.q, asked) - self.alpha * (load - load.mean(-1, keepdim=True))

    def chosen_shards(self, asked: PageQuery) -> Tensor:
        chosen, load = super().chosen_shards(asked), self.load[asked.layer].value[asked.rows]
        share, asks = asked.mean_of_rows(chosen.float())
        load.copy_(torch.where(asks, torch.lerp(load, share, 1 / self.window), load))
        return chosen

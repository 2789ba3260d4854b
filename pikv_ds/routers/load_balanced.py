import torch
from torch import Tensor

from pikv_ds.pages.pool import PagePool
from pikv_ds.pages.rows import Rows
from pikv_ds.routers import ROUTERS
from pikv_ds.routers.base import PageQuery
from pikv_ds.routers.memory import Asked, Memory
from pikv_ds.routers.shard_router import ShardRouter


@ROUTERS.register("load_balanced")
class LoadBalanced(ShardRouter):
    """Top-k shards with a penalty on those that many queries read lately (the paper's R_LB).

    g_s = scale q mu_s - alpha (load_s - mean load), load_s = running share of the request's queries that read shard s (mu_e in the paper),
    per layer: load <- (1 - 1/window) load + share / window after every forward of up to 32 queries, longer ones in such parts. What other
    requests read does not count: shards that each reads evenly are read evenly by all.
    Source: PiKV, arXiv 2508.06526, table 1.
    """

    def __init__(self, *, top_k: int = 1, alpha: float = 1.0, window: int = 16) -> None:
        if alpha < 0 or window < 1:
            raise ValueError(f"alpha >= 0 and window >= 1, got {alpha} and {window}")
        super().__init__(top_k=top_k)
        self.alpha, self.window = alpha, window
        self.load = Memory(self._learn)  # [R, S] f32
        self.memories = (self.load,)

    def open(self, layer: int, pool: PagePool, num_shards: int, rows: Rows) -> None:
        super().open(layer, pool, num_shards, rows)
        self.load.columns[layer] = rows.tensor(f"{layer}.load", (num_shards,), empties=True)

    def logits(self, asked: PageQuery) -> Tensor:
        load = self.load.columns[asked.layer].value[asked.row_of_query()]
        return self.mean_logits(asked.q, asked) - self.alpha * (load - load.mean(-1, keepdim=True))

    def chosen_shards(self, asked: PageQuery) -> Tensor:
        chosen = super().chosen_shards(asked)
        self.load.add(asked.asked, chosen.float())
        return chosen

    def _learn(self, asked: Asked, chosen: Tensor) -> None:
        load, (share, asks) = self.load.columns[asked.layer].value[asked.rows], asked.mean(chosen)
        load.copy_(torch.where(asks.unsqueeze(1), torch.lerp(load, share, 1 / self.window), load))

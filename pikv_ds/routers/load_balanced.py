from torch import Tensor

from pikv_ds.pages.pool import PagePool
from pikv_ds.pages.rows import Rows
from pikv_ds.routers import ROUTERS
from pikv_ds.routers.base import PageQuery
from pikv_ds.routers.shard_router import ShardRouter


@ROUTERS.register("load_balanced")
class LoadBalanced(ShardRouter):
    """Top-k shards with a penalty on those that many queries read lately (the paper's R_LB).

    g_s = scale q mu_s - alpha (load_s - mean load), load_s = running share of queries that read shard s (mu_e in the paper), per layer:
    load <- (1 - 1/window) load + share / window after every forward.
    Source: PiKV, arXiv 2508.06526, table 1.
    """

    def __init__(self, *, top_k: int = 1, alpha: float = 1.0, window: int = 16) -> None:
        if alpha < 0 or window < 1:
            raise ValueError(f"alpha >= 0 and window >= 1, got {alpha} and {window}")
        super().__init__(top_k=top_k)
        self.alpha, self.window = alpha, window
        self.load: dict[int, Tensor] = {}  # layer -> [S] f32

    def open(self, layer: int, pool: PagePool, num_shards: int, rows: Rows) -> None:
        super().open(layer, pool, num_shards, rows)
        self.load[layer] = rows.beside(f"{layer}.load", (num_shards,))

    def logits(self, asked: PageQuery) -> Tensor:
        load = self.load[asked.layer]
        return self.mean_logits(asked.q, asked) - self.alpha * (load - load.mean())

    def chosen_shards(self, asked: PageQuery) -> Tensor:
        chosen, real = super().chosen_shards(asked), (asked.positions >= 0).float()
        share = real @ chosen.float() / real.sum().clamp_min(1)
        self.load[asked.layer].lerp_(share, 1 / self.window)
        return chosen

import torch
from torch import Tensor

from pikv_ds.pages.pool import PagePool
from pikv_ds.pages.rows import Rows
from pikv_ds.routers import ROUTERS
from pikv_ds.routers.base import PageQuery
from pikv_ds.routers.memory import Asked, Memory
from pikv_ds.routers.shard_router import ShardRouter


@ROUTERS.register("sinkhorn")
class Sinkhorn(ShardRouter):
    """Top-k shards after a balancing of the gate that gives every shard the same share of the queries (online Sinkhorn).

    g_s = scale q mu_s / temperature + v_s; p = softmax(g), load_s = mean of p_s over the request's queries of a forward, or of each 32;
    after them v_s <- v_s - log(S load_s) / window, per layer, for shards that have entries, less the mean of v; |v_s| <= 20.
    A request has a v of its own: what others ask does not move it.
    With window 1 that is the column step of Sinkhorn's iteration; normalising the row of a query changes no order. A query is routed by
    what earlier forwards left in v: whole-batch Sinkhorn would show it the queries after it.
    Source: Sinkhorn routers, Clark et al., arXiv 2202.01169; PiKV's repository lists one without a formula.
    """

    def __init__(self, *, top_k: int = 1, temperature: float = 1.0, window: int = 4) -> None:
        if temperature <= 0 or window < 1:
            raise ValueError(f"temperature > 0 and window >= 1, got {temperature} and {window}")
        super().__init__(top_k=top_k)
        self.temperature, self.window = temperature, window
        self.potential = Memory(self._learn)  # v [R, S] f32
        self.memories = (self.potential,)

    def open(self, layer: int, pool: PagePool, num_shards: int, rows: Rows) -> None:
        super().open(layer, pool, num_shards, rows)
        self.potential.columns[layer] = rows.tensor(f"{layer}.potential", (num_shards,), empties=True)

    def logits(self, asked: PageQuery) -> Tensor:
        potential = self.potential.columns[asked.layer].value[asked.row_of_query()]
        logits = self.mean_logits(asked.q, asked) / self.temperature + potential  # asked once per block of queries
        self.potential.add(asked.asked, logits.softmax(-1).nan_to_num(0.0))
        return logits

    def _learn(self, asked: Asked, share: Tensor) -> None:
        potential, (load, asks) = self.potential.columns[asked.layer].value[asked.rows], asked.mean(share)
        step = torch.log((load.shape[1] * load).clamp_min(1e-6)) / self.window
        moved = torch.where(load > 0, potential - step, potential)
        potential.copy_(torch.where(asks.unsqueeze(1), (moved - moved.mean(-1, keepdim=True)).clamp(-20, 20), potential))

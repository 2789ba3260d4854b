import torch
from torch import Tensor

from pikv_ds.pages.pool import PagePool
from pikv_ds.pages.rows import Rows
from pikv_ds.routers import ROUTERS
from pikv_ds.routers.base import PageQuery
from pikv_ds.routers.memory import Asked, Memory
from pikv_ds.routers.shard_router import ShardRouter


@ROUTERS.register("budget_aware")
class BudgetAware(ShardRouter):
    """The best shards as long as their entries fit an allowance, which follows what was read so that a `share` is read on average.

    In the order of g_s = scale q mu_s, a shard is read while the entries of those before it and its own are at most allowance * n of the
    request's n; the first one always. After every forward, or each 32 queries of one, allowance <- allowance + (share - mean share read) /
    window, from 0 to 1, per request and layer. By Jensen's inequality n_s exp(g_s) is at most the shard's unnormalised attention, so g_s
    orders shards by what an entry is worth: the greedy rule of the fractional knapsack. Pinned pages come on top.
    Source: Dantzig's rule, Operations Research 5(2), 1957; PiKV's repository lists a budget-aware router without a formula.
    """

    def __init__(self, *, share: float = 0.25, window: int = 16) -> None:
        if not 0 < share <= 1 or window < 1:
            raise ValueError(f"0 < share <= 1 and window >= 1, got {share} and {window}")
        super().__init__(top_k=1)
        self.share, self.window = share, window
        self.more = Memory(self._learn)  # [R] f32, what the allowance has above the share
        self.memories = (self.more,)

    def open(self, layer: int, pool: PagePool, num_shards: int, rows: Rows) -> None:
        super().open(layer, pool, num_shards, rows)
        self.more.columns[layer] = rows.tensor(f"{layer}.allowance", (), empties=True)

    def logits(self, asked: PageQuery) -> Tensor:
        return self.mean_logits(asked.q, asked)

    def chosen_shards(self, asked: PageQuery) -> Tensor:
        logits, more = self.logits(asked), self.more.columns[asked.layer].value
        allowance = self.share + more[asked.row_of_query()].unsqueeze(-1)
        held = self.counts[asked.layer].value[asked.row_of_query()]
        held = held / held.sum(-1, keepdim=True).clamp_min(1)
        order = logits.argsort(dim=-1, descending=True, stable=True)
        spent = held.gather(-1, order).cumsum(-1)
        fits = (spent <= allowance + 1e-6) & (logits.gather(-1, order) > -torch.inf)
        fits[:, 0] = logits.gather(-1, order)[:, 0] > -torch.inf
        chosen = torch.zeros_like(fits).scatter_(1, order, fits)
        self.more.add(asked.asked, (held * chosen).sum(-1))
        return chosen

    def _learn(self, asked: Asked, read: Tensor) -> None:
        more, read = self.more.columns[asked.layer].value[asked.rows], asked.mean(read)[0]
        change = torch.where(read > 0, (self.share - read) / self.window, 0.0)  # nothing read: nothing stored yet, or nobody asked
        more.copy_((more + change).clamp(-self.share, 1 - self.share))

import torch
from torch import Tensor

from pikv_ds.pages.pool import PagePool
from pikv_ds.pages.rows import Rows
from pikv_ds.routers import ROUTERS
from pikv_ds.routers.base import PageQuery
from pikv_ds.routers.memory import Asked, Memory
from pikv_ds.routers.shard_router import ShardRouter


@ROUTERS.register("cache_aware")
class CacheAware(ShardRouter):
    """Top-k shards with a penalty on those that were read in vain (the paper's R_P, PiKVRouter).

    g_s = scale q mu_s - penalty log(1 + miss_s). A read of shard s is a miss when its entries hold less of the attention than their share
    of all entries read, measured on the attention itself (lse per page); miss_s = sum over forwards, or each 32 queries of one, of the
    share of the request's queries and heads that missed, decayed by 1 - 1/window. With several ranks it costs one more collective per
    layer, of the shards' lse.
    Source: PiKV, arXiv 2508.06526, table 1, which does not define a miss.
    """

    wants_page_lse = True

    def __init__(self, *, top_k: int = 1, penalty: float = 0.5, window: int = 16) -> None:
        if penalty < 0 or window < 1:
            raise ValueError(f"penalty >= 0 and window >= 1, got {penalty} and {window}")
        super().__init__(top_k=top_k)
        self.penalty, self.window = penalty, window
        self.misses = Memory(self._learn)  # [R, S] f32
        self.memories = (self.misses,)

    def open(self, layer: int, pool: PagePool, num_shards: int, rows: Rows) -> None:
        super().open(layer, pool, num_shards, rows)
        self.misses.columns[layer] = rows.tensor(f"{layer}.misses", (num_shards,), empties=True)

    def logits(self, asked: PageQuery) -> Tensor:
        return self.mean_logits(asked.q, asked) - self.penalty * torch.log1p(self.misses.columns[asked.layer].value[asked.row_of_query()])

    def missed(self, layer: int) -> Tensor:
        misses = self.misses.columns[layer].value
        return misses.sum(0) / max(misses.shape[0], 1)

    def answered(self, asked: PageQuery, page_list: Tensor, page_lse: Tensor) -> None:
        entries = asked.entries.flatten(0, 1).unsqueeze(1)  # [N, 1, C]; one list for all heads
        read = torch.where(page_list >= 0, entries.gather(-1, page_list.clamp_min(0).long()), 0).sum(-1, dtype=torch.float32)  # [N, 1]
        own = torch.cat([page_lse.logsumexp(-1), read], 1).unflatten(0, asked.visible.shape[:2])
        lse, read = asked.over_shards(own).split([page_lse.shape[1], 1], -1)  # [Q, S, Hq], [Q, S, 1]
        share = torch.exp(lse - lse.logsumexp(1, keepdim=True)).nan_to_num(0.0)
        missed = (read > 0) & (share < read / read.sum(1, keepdim=True).clamp_min(1))
        self.misses.add(asked.asked, missed.float().mean(-1))

    def _learn(self, asked: Asked, missed: Tensor) -> None:
        misses, (rate, asks) = self.misses.columns[asked.layer].value[asked.rows], asked.mean(missed)
        misses.copy_(torch.where(asks.unsqueeze(1), misses * (1 - 1 / self.window) + rate, misses))

import torch
from torch import Tensor

from pikv_ds.routers import ROUTERS
from pikv_ds.routers.base import PageQuery, Router


@ROUTERS.register("page_oracle")
class PageOracle(Router):
    """Control: the pages that hold the most attention, known by reading them all. The most that a choice of pages can hold.

    score = sum over the query heads of a kv head of exp(lse of the page - lse of all pages). No saving: every page is read to be scored,
    which the entries read do not count.
    """

    by_block = True

    def score(self, asked: PageQuery) -> Tensor:
        pool, num_heads = asked.pool, asked.pool.fmt.num_kv_heads
        _, lse, page_lse = pool.reader.attend_listed(
            asked.q,
            asked.view,
            None,
            scale=asked.scale,
            window=asked.window,
            q_positions=asked.positions,
            page_lse=True,
            block_size=pool.block_size,
        )
        lse = lse if asked.near_lse is None else torch.logaddexp(lse, asked.near_lse)
        total = asked.gather(lse).logsumexp(0).repeat_interleave(page_lse.shape[0] // lse.shape[0], 0).unsqueeze(-1)
        mass = torch.exp(page_lse - total.clamp_min(torch.finfo(torch.float32).min))  # [N, Hq, C]
        return mass.unflatten(1, (num_heads, -1)).sum(2)

from typing import ClassVar

import torch
from torch import Tensor

from pikv_ds.policies import POLICIES
from pikv_ds.policies.base import Pages, RetentionPolicy


@POLICIES.register("quest")
class Bounds(RetentionPolicy):
    """Keep the pages that the latest query could attend to most, judged by the box around their keys.

    bound_h(page) = scale sum_d max(q_hd lo_d, q_hd hi_d), lo and hi the smallest and largest key of the page per channel
    score(page) = mean over query heads of exp(bound_h - lse_h), lse of the query's attention: no entry of the page can have a larger share
    Reads the keys back at each eviction; keeps a query and its lse per request and layer.

    Source: Tang et al., Quest, arXiv 2406.10774, section 3.3, which reads the best pages and evicts none. The MLP on [K_i, V_i] that PiKV
    (arXiv 2508.06526, table 3) names S_QUEST is another method.
    """

    observes_queries = True
    row_queries: ClassVar[tuple[str, ...]] = ("query",)

    def row_values(self, num_q_heads: int, k_dim: int) -> dict[str, tuple[int, ...]]:
        return {"query": (num_q_heads, k_dim), "lse": (num_q_heads,)}

    def observe_queries(self, rows: dict[str, Tensor], q: Tensor, lse: Tensor, positions: Tensor) -> None:
        asked = positions[:, -1] >= 0
        rows["query"].copy_(torch.where(asked[:, None, None], q[:, -1], rows["query"]))
        rows["lse"].copy_(torch.where(asked[:, None], lse[:, -1], rows["lse"]))

    def score(self, pages: Pages) -> Tensor:
        lo, hi = pages.keys.amin(-2), pages.keys.amax(-2)  # [R, S, C, Hkv, Dk]
        q = pages.rows["query"].unflatten(1, (lo.shape[3], -1))[:, None, None]  # scaled; [R, 1, 1, Hkv, G, Dk]
        bound = torch.maximum(q * lo.unsqueeze(-2), q * hi.unsqueeze(-2)).sum(-1).flatten(3)
        return torch.exp((bound - pages.rows["lse"][:, None, None]).clamp_max(30)).mean(-1)

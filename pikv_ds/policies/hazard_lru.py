from typing import ClassVar

import torch
from torch import Tensor

from pikv_ds.policies import POLICIES
from pikv_ds.policies.base import Pages, Seen
from pikv_ds.policies.lru import LeastRecentlyUsed


@POLICIES.register("hazard_lru")
class HazardLRU(LeastRecentlyUsed):
    """Evict the page at the highest risk: long unused, unlike what is asked now, uncertain in its use.

    score(page) = -(age * r / (r + half_life) + dissimilarity * (1 - cos) / 2 + uncertainty * h)
        r = queries since the last use (as in `lru`); cos = cosine of the latest query and the page's mean key, mean over query heads
        h = entropy in bits of used or not, with probability (uses + 1) / (queries that saw the page + 2)
    Each term is from 0 to 1. Reads the keys back at each eviction; costs 12 bytes per page, and a query per request and layer.

    Source: the Hazard-LRU scheduler of PiKV's repository: age, dissimilarity and entropy with weights .5, .3, .2. There age is divided by
    the largest one, keys are compared with keys, and nothing supplies an entropy: r / (r + half_life), the query and h are our reading.
    """

    page_values: ClassVar[dict[str, torch.dtype]] = {"used": torch.int32, "uses": torch.int32, "asked": torch.int32}
    observes_queries = True
    row_queries: ClassVar[tuple[str, ...]] = ("query",)

    def __init__(
        self,
        *,
        threshold: float = 1.0,
        age: float = 0.5,
        dissimilarity: float = 0.3,
        uncertainty: float = 0.2,
        half_life: float = 64.0,
    ) -> None:
        super().__init__(threshold=threshold)
        if min(age, dissimilarity, uncertainty) < 0 or half_life <= 0:
            raise ValueError(
                f"age, dissimilarity, uncertainty >= 0 and half_life > 0, got {age}, {dissimilarity}, {uncertainty}, {half_life}"
            )
        self.weights, self.half_life = (age, dissimilarity, uncertainty), half_life

    def observe(self, values: dict[str, Tensor], seen: Seen) -> None:
        super().observe(values, seen)
        values["uses"] += self.used_by(seen).sum(1, dtype=torch.int32)
        values["asked"] += torch.where(seen.share > 0, seen.asked, False).sum(1, dtype=torch.int32)

    def row_values(self, num_q_heads: int, k_dim: int) -> dict[str, tuple[int, ...]]:
        return {"query": (num_q_heads, k_dim)}

    def observe_queries(self, rows: dict[str, Tensor], q: Tensor, lse: Tensor, positions: Tensor) -> None:
        asked = positions[:, -1] >= 0
        rows["query"].copy_(torch.where(asked[:, None, None], q[:, -1], rows["query"]))

    def score(self, pages: Pages) -> Tensor:
        age, dissimilarity, uncertainty = self.weights
        since = (pages.time - pages.value("used")).float()
        key = pages.keys.sum(-2).unsqueeze(-2)  # [R, S, C, Hkv, 1, Dk]: a cosine does not know a mean from a sum
        query = pages.rows["query"].unflatten(1, (key.shape[3], -1))[:, None, None]
        cos = torch.nn.functional.cosine_similarity(query, key, dim=-1).flatten(3).mean(-1)
        p = (pages.value("uses") + 1) / (pages.value("asked") + 2)
        entropy = (torch.special.entr(p) + torch.special.entr(1 - p)) / torch.log(torch.tensor(2.0))
        return -(age * since / (since + self.half_life) + dissimilarity * (1 - cos) / 2 + uncertainty * entropy)

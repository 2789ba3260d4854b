from typing import ClassVar

import torch
from torch import Tensor

from pikv_ds.policies import POLICIES
from pikv_ds.policies.base import Pages, Seen
from pikv_ds.policies.lru import LeastRecentlyUsed


@POLICIES.register("adakv")
class WeightedFeatures(LeastRecentlyUsed):
    """Weigh attention, recency and frequency of use; evict more while too few of the kept pages are used.

    score(page) = attention * a + recency * 2^(-r / half_life) + frequency * f
        a = mean over the queries since it was stored of share / fair share; r = queries since the last use (as in `lru`); f = share of the
        queries that used it
    theta <- theta + rate (hit_rate - eta) at each eviction, eta = share of the pages that are not pinned and were used since the last one;
    pages that score below theta go even when the budget would keep them. rate = 0 leaves the budget alone. Costs 16 bytes per page.

    Source: PiKV, arXiv 2508.06526, table 3, S_AdaKV; features and eta are our reading. Ada-KV (Feng et al., arXiv 2407.11550) is another
    method: budgets that differ between heads.
    """

    page_values: ClassVar[dict[str, torch.dtype]] = {
        "used": torch.int32,
        "uses": torch.int32,
        "asked": torch.int32,
        "attention": torch.float32,
    }

    def __init__(
        self,
        *,
        threshold: float = 1.0,
        attention: float = 1.0,
        recency: float = 1.0,
        frequency: float = 1.0,
        half_life: float = 64.0,
        hit_rate: float = 0.5,
        rate: float = 0.05,
    ) -> None:
        super().__init__(threshold=threshold)
        if min(attention, recency, frequency, rate) < 0 or half_life <= 0 or not 0 <= hit_rate <= 1:
            raise ValueError("attention, recency, frequency, rate >= 0, half_life > 0, hit_rate from 0 to 1")
        self.weights, self.half_life = (attention, recency, frequency), half_life
        self.target_hit_rate, self.threshold_rate = (hit_rate, rate) if rate else (None, 0.0)

    def observe(self, values: dict[str, Tensor], seen: Seen) -> None:
        super().observe(values, seen)
        values["uses"] += self.used_by(seen).sum(1, dtype=torch.int32)
        values["asked"] += torch.where(seen.share > 0, seen.asked, False).sum(1, dtype=torch.int32)
        values["attention"] += seen.share.sum(1) / seen.fair

    def score(self, pages: Pages) -> Tensor:
        asked = pages.value("asked").clamp_min(1)
        age = (pages.time - pages.value("used")).float()
        features = pages.value("attention") / asked, torch.exp2(-age / self.half_life), pages.value("uses") / asked
        return sum(weight * feature for weight, feature in zip(self.weights, features, strict=True))

    def hits(self, pages: Pages) -> Tensor:
        return pages.value("used") > pages.last_eviction

from typing import ClassVar

import torch
from torch import Tensor

from pikv_ds.policies import POLICIES
from pikv_ds.policies.base import Pages, Seen
from pikv_ds.policies.lru import LeastRecentlyUsed


@POLICIES.register("lru_plus")
class LeastRecentlyAndFrequentlyUsed(LeastRecentlyUsed):
    """LRU that forgives a page for each time it was used.

    score(page) = -r + weight * f, r = queries since the last use (as in `lru`), f = number of uses. Costs 8 bytes per page.
    Source: PiKV, arXiv 2508.06526, table 3, S_LRU+.
    """

    page_values: ClassVar[dict[str, torch.dtype]] = {"used": torch.int32, "uses": torch.int32}

    def __init__(self, *, threshold: float = 1.0, weight: float = 1.0) -> None:
        super().__init__(threshold=threshold)
        if weight < 0:
            raise ValueError(f"weight >= 0, got {weight}: uses must not count against a page")
        self.weight = weight

    def observe(self, values: dict[str, Tensor], seen: Seen) -> None:
        super().observe(values, seen)
        values["uses"] += self.used_by(seen).sum(1, dtype=torch.int32)

    def score(self, pages: Pages) -> Tensor:
        return super().score(pages) + self.weight * pages.value("uses")

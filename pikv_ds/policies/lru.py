from typing import ClassVar

import torch
from torch import Tensor

from pikv_ds.policies import POLICIES
from pikv_ds.policies.base import Pages, RetentionPolicy, Seen


@POLICIES.register("lru")
class LeastRecentlyUsed(RetentionPolicy):
    """Evict the page whose last use is longest ago.

    score(page) = -r, r = queries since one gave the page at least `threshold` times its fair share (1 / number of pages) of attention.
    Costs 4 bytes per page. Source: PiKV, arXiv 2508.06526, table 3, S_LRU; it leaves open what a use is.
    """

    page_values: ClassVar[dict[str, torch.dtype]] = {"used": torch.int32}

    def __init__(self, *, threshold: float = 1.0) -> None:
        if not threshold > 0:
            raise ValueError(f"threshold > 0, got {threshold}: at 0 every query would use every page")
        self.threshold = threshold

    def used_by(self, seen: Seen) -> Tensor:
        """[P, T] bool: the query used the page."""
        return seen.share >= (self.threshold * seen.fair).unsqueeze(-1)

    def observe(self, values: dict[str, Tensor], seen: Seen) -> None:
        torch.maximum(values["used"], torch.where(self.used_by(seen), seen.at, 0).amax(1), out=values["used"])

    def score(self, pages: Pages) -> Tensor:
        return pages.value("used").float()

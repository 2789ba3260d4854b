from typing import ClassVar

import torch
from torch import Tensor

from pikv_ds.policies import POLICIES
from pikv_ds.policies.base import Pages, Seen
from pikv_ds.policies.lru import LeastRecentlyUsed

_PROTECTED = 1 << 22
"""Above every query count and position that f32 tells apart."""


@POLICIES.register("two_queue")
class TwoQueues(LeastRecentlyUsed):
    """Pages on probation leave first, in the order they came; those used again later are protected, and leave by their last use.

    A page is protected when its last use (as in `lru`) is at least `correlated` queries after the first query that saw it.
    score(page) = 2^22 + time of the last use when protected, else the position of its last entry. Costs 8 bytes per page.

    recent_tokens of the "scheduling" block is the first queue (A1in), which every entry passes; what left is gone, so there is no third
    one of names (A1out), and probation lasts until the budget needs the place.
    Source: Johnson and Shasha, 2Q, VLDB 1994. The two-queue scheduler of PiKV's repository admits by norms and compares nothing.
    """

    page_values: ClassVar[dict[str, torch.dtype]] = {"used": torch.int32, "stored": torch.int32}

    def __init__(self, *, threshold: float = 1.0, correlated: int = 64) -> None:
        super().__init__(threshold=threshold)
        if correlated < 1:
            raise ValueError(f"correlated >= 1, got {correlated}: queries during which uses of a page count as one")
        self.correlated = correlated

    def observe(self, values: dict[str, Tensor], seen: Seen) -> None:
        super().observe(values, seen)
        saw = torch.where(seen.share > 0, seen.asked, False)
        first = seen.time + 1 + saw.to(torch.int8).argmax(1)  # the first of equal maxima
        values["stored"].copy_(torch.where((values["stored"] == 0) & saw.any(1), first, values["stored"]))

    def score(self, pages: Pages) -> Tensor:
        used = pages.value("used")
        protected = used - pages.value("stored") >= self.correlated
        return torch.where(protected, _PROTECTED + used, pages.last_position).float()

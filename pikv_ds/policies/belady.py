from typing import ClassVar

import torch
from torch import Tensor

from pikv_ds.policies import POLICIES
from pikv_ds.policies.base import Pages, Seen
from pikv_ds.policies.lru import LeastRecentlyUsed


@POLICIES.register("belady")
class PredictedNextUse(LeastRecentlyUsed):
    """Evict the page whose next use is predicted to be furthest away, from the intervals between its uses so far.

    g = (last use - first use) / (uses - 1), the mean interval; r = queries since the last use (a use as in `lru`)
    wait = g - r while r <= g; r when the page is overdue, was used once or never (r counts from the beginning for these)
    score(page) = -wait. Costs 12 bytes per page.

    Source: Belady, IBM Systems Journal 5(2), 1966, evicts by the true next use, which is not known. The mean interval in its place is our
    reading of the Belady-approximate scheduler of PiKV's repository, which smooths r itself and divides it by attention.
    """

    page_values: ClassVar[dict[str, torch.dtype]] = {"used": torch.int32, "first": torch.int32, "uses": torch.int32}

    def observe(self, values: dict[str, Tensor], seen: Seen) -> None:
        super().observe(values, seen)
        used = self.used_by(seen)
        first = seen.time + 1 + used.to(torch.int8).argmax(1)  # the first of equal maxima
        values["first"].copy_(torch.where((values["uses"] == 0) & used.any(1), first, values["first"]))
        values["uses"] += used.sum(1, dtype=torch.int32)

    def score(self, pages: Pages) -> Tensor:
        used, first, uses = (pages.value(name).float() for name in ("used", "first", "uses"))
        interval, since = (used - first) / (uses - 1).clamp_min(1), pages.time - used
        return -torch.where((uses > 1) & (since <= interval), interval - since, since)

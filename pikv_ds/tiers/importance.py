"""How important a page is to the queries so far: what decides which pages stay in the light codec."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from pikv_ds.policies.base import Pages, RetentionPolicy, Seen

VALUE = "importance"


class Importance(RetentionPolicy):
    """importance(page) = sum over all queries so far of the share of attention that falls into the page, mean over heads.

    Not a method of the "scheduling" block: nothing leaves by it. 4 bytes per page. PiKV, arXiv 2508.06526, section 3.3, leaves the measure
    open; this is H2O's (arXiv 2306.14048).
    """

    name = "importance"
    page_values: ClassVar[dict[str, torch.dtype]] = {VALUE: torch.float32}

    def observe(self, values: dict[str, Tensor], seen: Seen) -> None:
        values[VALUE] += seen.share.sum(1)

    def score(self, pages: Pages) -> Tensor:
        return pages.value(VALUE)

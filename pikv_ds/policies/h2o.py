from typing import ClassVar

import torch
from torch import Tensor

from pikv_ds.policies import POLICIES
from pikv_ds.policies.base import Pages, RetentionPolicy, Seen


@POLICIES.register("h2o")
class HeavyHitters(RetentionPolicy):
    """Keep what has been attended to most since it was stored.

    score(page) = sum over all queries so far of the share of attention that falls into the page, mean over heads. The recent half of the
    original's budget is recent_tokens of the "scheduling" block. Costs 4 bytes per page. The codec `adaptive` encodes by the same score
    (tiers/window.py).

    Source: Zhang et al., H2O, arXiv 2306.14048, algorithm 1 (per token and head there, per page here). The paper's S_H2O, u_i = a_i.
    """

    page_values: ClassVar[dict[str, torch.dtype]] = {"mass": torch.float32}

    def observe(self, values: dict[str, Tensor], seen: Seen) -> None:
        values["mass"] += seen.share.sum(1)

    def score(self, pages: Pages) -> Tensor:
        return pages.value("mass")

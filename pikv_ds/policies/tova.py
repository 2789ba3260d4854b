from typing import ClassVar

import torch
from torch import Tensor

from pikv_ds.policies import POLICIES
from pikv_ds.policies.base import Pages, RetentionPolicy, Seen


@POLICIES.register("tova")
class TokenOmissionViaAttention(RetentionPolicy):
    """Keep what the latest query attends to.

    score(page) = share of the last query's attention that falls into the page, mean over heads. Costs 4 bytes per page.
    Source: Oren et al., Transformers are Multi-State RNNs, arXiv 2401.06104, section 4 (per token there, per page here).
    """

    page_values: ClassVar[dict[str, torch.dtype]] = {"last": torch.float32}
    window = 1

    def observe(self, values: dict[str, Tensor], seen: Seen) -> None:
        values["last"].copy_(torch.where(seen.asked[:, -1], seen.share[:, -1], values["last"]))

    def score(self, pages: Pages) -> Tensor:
        return pages.value("last")

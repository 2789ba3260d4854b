from typing import ClassVar

import torch
from torch import Tensor

from pikv_ds.policies import POLICIES
from pikv_ds.policies.base import Pages, RetentionPolicy, Seen


@POLICIES.register("kvzip")
class Reconstruction(RetentionPolicy):
    """Keep what the model looks at when it repeats the prompt, whatever will be asked about it.

    score(page) = the largest share of attention that a query gave the page since the last rehearsal, mean over heads; since it was stored
    when there was none. A rehearsal feeds the prompt a second time and takes it back (pikv_ds/adapters/hf/rehearse.py); it costs a second
    prefill, and needs `prefill` "keep". Without one this is the peak of ordinary attention. Costs 4 bytes per page.
    Source: Kim et al., KVzip, arXiv 2505.23416, section 3 (the largest attention per entry and head there, per page here).
    """

    page_values: ClassVar[dict[str, torch.dtype]] = {"peak": torch.float32}

    def observe(self, values: dict[str, Tensor], seen: Seen) -> None:
        torch.maximum(values["peak"], seen.share.amax(1), out=values["peak"])

    def score(self, pages: Pages) -> Tensor:
        return pages.value("peak")

from torch import Tensor

from pikv_ds.policies import POLICIES
from pikv_ds.policies.base import Pages, RetentionPolicy


@POLICIES.register("flexgen")
class TierPlan(RetentionPolicy):
    """Keep the first tier's share of a placement plan over device, host and disk: the latest entries of each layer.

    The plan is `pikv plan --tiers` (pikv_ds/tiers/plan.py); its device share is the budget_ratio to give here.
    score(page) = position of its last entry: within a layer the plan says how much lies in each tier, not what; the latest stays.
    With a budget it evicts what the plan puts into slower tiers: say so with `drop_lower_tiers` true. pikv.offload keeps that, the oldest
    pages below, and takes no budget (docs/guide/offload.md). Costs no memory, and keeps what `streaming_llm` keeps.

    Source: Sheng et al., FlexGen, arXiv 2303.06865, section 4.3 (shares of each tensor per tier). PiKV, arXiv 2508.06526, table 3, S_Flex.
    """

    reads_positions_only = True

    def __init__(self, *, drop_lower_tiers: bool) -> None:
        if not drop_lower_tiers:
            raise ValueError(
                "drop_lower_tiers = true: this policy evicts what the plan puts into slower tiers; pikv.offload with method "
                "'none' keeps it there"
            )

    def score(self, pages: Pages) -> Tensor:
        return pages.last_position.float()

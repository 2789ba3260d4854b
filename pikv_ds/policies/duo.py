from typing import ClassVar

from pikv_ds.policies import POLICIES
from pikv_ds.policies.h2o import HeavyHitters


@POLICIES.register("duo")
class LayerSum(HeavyHitters):
    """Keep the same entries in every layer: those that all layers together have attended to most.

    score(page) = sum over layers of the accumulated share of attention, as in `h2o`. Needs pages that hold the same entries in every layer:
    one shard, or storage.placement = "position". Costs 4 bytes per page.

    Source: PiKV, arXiv 2508.06526, table 3, S_Duo, u_i = sum_l a_i^(l). DuoAttention (Xiao et al., arXiv 2410.10819) is another method:
    retrieval heads keep everything, streaming heads sinks and recent entries.
    """

    sums_layers: ClassVar[bool] = True

from torch import Tensor

from pikv_ds.policies import POLICIES
from pikv_ds.policies.base import Pages, TokenPolicy


@POLICIES.register("streaming_llm")
class StreamingLLM(TokenPolicy):
    """Keep the attention sinks and the latest entries (the control that every other policy is compared with).

    score(entry) = its position, and the page that ends last stays longest; sink_tokens of the "scheduling" block pins the sinks. Positions
    stay those of the sequence: keys were rotated before they were stored and are not rotated again when those before them go (the original
    re-numbers them).

    Source: Xiao et al., Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453, section 3.2. The paper's S_SL.
    """

    reads_positions_only = True

    def entry_scores(self, pages: Pages) -> Tensor:
        return pages.slot_positions.float()

    def score(self, pages: Pages) -> Tensor:
        return pages.last_position.float()

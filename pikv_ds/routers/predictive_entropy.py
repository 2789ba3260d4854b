import torch
from torch import Tensor

from pikv_ds.routers import ROUTERS
from pikv_ds.routers.base import PageQuery
from pikv_ds.routers.shard_router import ShardRouter


@ROUTERS.register("predictive_entropy")
class PredictiveEntropy(ShardRouter):
    """As many of the best shards as the gate is unsure between: one when it is sure, up to `top_k` when it is not.

    p = softmax(g / temperature), g_s = scale q mu_s; k = exp(H(p)), the number of equally likely shards of the same entropy, rounded and
    held between 1 and top_k; the k highest g_s are read.
    Source: reading by uncertainty as in Huang et al., Harder Tasks Need More Experts, arXiv 2403.07652, which takes shares up to
    a sum in place of exp(H); PiKV's repository lists a predictive-entropy router without a formula.
    """

    def __init__(self, *, top_k: int = 2, temperature: float = 1.0) -> None:
        if temperature <= 0:
            raise ValueError(f"temperature > 0, got {temperature}")
        super().__init__(top_k=top_k)
        self.temperature = temperature

    def logits(self, asked: PageQuery) -> Tensor:
        logits = self.mean_logits(asked.q, asked)
        p = (logits / self.temperature).softmax(-1).nan_to_num(0.0)
        count = torch.exp(torch.special.entr(p).sum(-1, keepdim=True)).round()
        rank = logits.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        return logits.masked_fill(rank >= count, -torch.inf)

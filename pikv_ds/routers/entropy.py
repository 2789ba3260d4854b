import torch
from torch import Tensor

from pikv_ds.routers import ROUTERS
from pikv_ds.routers.base import PageQuery
from pikv_ds.routers.shard_router import ShardRouter


@ROUTERS.register("entropy")
class EntropyPenalised(ShardRouter):
    """Top-k shards with a penalty on those that the gate is unsure about (the paper's R_E, EPLB).

    g_s = scale q mu_s - beta h(p_s), p = softmax(scale q mu) over the shards, h(p) = -p log p - (1 - p) log(1 - p).
    Source: PiKV, arXiv 2508.06526, table 1, which writes H(p_e) and does not say of which distribution.
    """

    def __init__(self, *, top_k: int = 1, beta: float = 1.0) -> None:
        if beta < 0:
            raise ValueError(f"beta >= 0, got {beta}")
        super().__init__(top_k=top_k)
        self.beta = beta

    def logits(self, asked: PageQuery) -> Tensor:
        logits = self.mean_logits(asked.q, asked)
        p = logits.softmax(-1).nan_to_num(0.0)
        return logits - self.beta * (torch.special.entr(p) + torch.special.entr(1 - p))

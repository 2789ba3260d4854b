import torch

from pikv_ds.codecs import CODECS
from pikv_ds.codecs.calibration import Moments
from pikv_ds.codecs.linear import LinearCodec
from pikv_ds.codecs.maps import Linear


@CODECS.register("prune")
class Prune(LinearCodec):
    """Structured channel pruning: r channels of every kv head are kept, chosen once from the calibration; Z are the others.

    Keys keep the channels j of largest E[q_j^2] E[k_j^2], as ThinK's ||q_j|| ||k_j||, values those of largest
    ||W_o,j||^2 E[v_j^2]. Channels of Z read as 0:
    ||k - k_hat||^2 = sum_{j in Z} k_j^2. ThinK chooses per request and prunes keys only; here every request has the same channels, so
    that pages of one layout hold them all, and ranks need not agree.
    Source: PiKV, arXiv 2508.06526, table 2 (C_Pr); Xu et al., ThinK, arXiv 2407.21018.
    Bytes per token and layer: those of `store` at width r, as lora.
    """

    def fit(self, moments: Moments, rank: int) -> Linear:
        energy = moments.second.diagonal(dim1=-2, dim2=-1)
        if moments.metric is not None:
            energy = energy * moments.metric.diagonal(dim1=-2, dim2=-1)
        kept = energy.topk(rank, dim=-1).indices.sort(-1).values  # [H, r]
        encode = torch.nn.functional.one_hot(kept, energy.shape[1]).to(energy.dtype).mT
        return Linear(encode, encode.mT)

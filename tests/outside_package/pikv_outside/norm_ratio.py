import torch
from torch import Tensor

from pikv_ds.policies import POLICIES
from pikv_ds.policies.base import Pages, TokenPolicy


@POLICIES.register("norm_ratio")
class NormRatio(TokenPolicy):
    """Keep entries with short keys and long values: they get attention, and change what comes out.

    score(entry) = log(||v||_2 / ||k||_2), mean over kv heads; a page has the mean of its entries. Reads keys and values back at each
    eviction, costs no memory.
    Source: ours; the keys' part is `knorm` (Devoto et al., arXiv 2406.11430).
    """

    def entry_scores(self, pages: Pages) -> Tensor:
        k, v = (torch.linalg.vector_norm(x, dim=-1).clamp_min(1e-9) for x in (pages.keys, pages.values))
        return (v / k).log().mean(3)

import torch
from torch import Tensor

from pikv_ds.policies import POLICIES
from pikv_ds.policies.base import Pages, TokenPolicy


@POLICIES.register("knorm")
class KeyNorm(TokenPolicy):
    """Keep entries with short keys: a long key tends to get little attention.

    score(entry) = -||k||_2, mean over heads; a page has the mean of its entries. Reads the keys back at each eviction, costs no memory.
    Source: Devoto et al., A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression, arXiv 2406.11430.
    """

    def entry_scores(self, pages: Pages) -> Tensor:
        return -torch.linalg.vector_norm(pages.keys, dim=-1).mean(3)

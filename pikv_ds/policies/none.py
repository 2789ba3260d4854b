import torch
from torch import Tensor

from pikv_ds.policies import POLICIES
from pikv_ds.policies.base import Pages, RetentionPolicy


@POLICIES.register("none")
class KeepAll(RetentionPolicy):
    """Never evict (exact mode).

    score = +inf for each page. Bytes: those of every token that was appended and has not left its layer's window.
    """

    keeps_all = True

    def score(self, pages: Pages) -> Tensor:
        return torch.full(pages.entries.shape, torch.inf, dtype=torch.float32, device=pages.entries.device)

import torch
from torch import Tensor

from pikv_ds.routers import ROUTERS
from pikv_ds.routers.base import PageQuery, Router


@ROUTERS.register("all")
class AllPages(Router):
    """Every query reads every page (exact mode).

    score = 0 for each page. Entries read per query and layer: all that are stored and inside the window.
    """

    reads_all = True

    def score(self, asked: PageQuery) -> Tensor:
        return torch.zeros_like(asked.block_table, dtype=torch.float32)

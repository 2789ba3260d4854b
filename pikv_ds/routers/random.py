from torch import Tensor

from pikv_ds.routers import ROUTERS
from pikv_ds.routers.base import PageQuery, Router
from pikv_ds.routers.scramble import scramble


@ROUTERS.register("random")
class RandomPages(Router):
    """Control: pages drawn anew for every query, beside those that every query reads.

    score = hash of (seed, layer, query position, position of the page's first entry), the same on any number of ranks.
    """

    by_summary = by_block = True

    def __init__(self, *, seed: int = 0) -> None:
        self.seed = seed

    def score(self, asked: PageQuery) -> Tensor:
        query = scramble(asked.positions, self.seed * 1009 + asked.layer).view(-1, 1, 1)
        return scramble(asked.first + query, 1).flatten(0, 1).unsqueeze(1).float()

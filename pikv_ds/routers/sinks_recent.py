from torch import Tensor

from pikv_ds.routers import ROUTERS
from pikv_ds.routers.base import PageQuery, Router


@ROUTERS.register("sinks_recent")
class SinksRecent(Router):
    """Control: the sinks, and the most recent pages until the budget is full.

    score = position of the page's last entry. Reads as many entries as any other router at the same budget, and asks nothing of the query.
    Source: StreamingLLM's window, arXiv 2309.17453.
    """

    by_summary = by_block = True

    def score(self, asked: PageQuery) -> Tensor:
        return asked.last.flatten(0, 1).unsqueeze(1).float()

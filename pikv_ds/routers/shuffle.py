from typing import Literal

from torch import Tensor

from pikv_ds.pages.pool import PagePool
from pikv_ds.pages.rows import Rows
from pikv_ds.routers import ROUTERS
from pikv_ds.routers.base import PageChange, PageQuery
from pikv_ds.routers.bounds import PageBounds
from pikv_ds.routers.earlier import Earlier


@ROUTERS.register("shuffle")
class Shuffle(PageBounds):
    """Control: page bounds asked with the query of another position of the request, so that pages keep their popularity.

    score as in `bounds`, for a query drawn from the latest 128 of its row (same layer and heads). What `bounds` holds more of the attention
    than this, it owes to the query. Bytes: those of bounds; as metadata 129 queries per request and
    layer.
    """

    def __init__(
        self, *, spread: float = 0.4, heads: Literal["mean", "max"] = "mean", metadata: Literal["fp32", "bf16", "fp16", "int8"] = "bf16"
    ) -> None:
        super().__init__(spread=spread, heads=heads, metadata=metadata)
        self.earlier = Earlier()
        self.memories = (self.earlier.memory,)

    def open(self, layer: int, pool: PagePool, num_shards: int, rows: Rows) -> None:
        super().open(layer, pool, num_shards, rows)
        self.earlier.open(layer, rows)

    def rebuilt(self, layer: int, pool: PagePool, change: PageChange) -> None:
        super().rebuilt(layer, pool, change)
        self.earlier.rebuilt(change)

    def score(self, asked: PageQuery) -> Tensor:
        return self.score_with(self.earlier.swap(asked, asked.q), asked)

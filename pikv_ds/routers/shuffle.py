from typing import Literal

import torch
from torch import Tensor

from pikv_ds.routers import ROUTERS
from pikv_ds.routers.base import PageQuery
from pikv_ds.routers.bounds import PageBounds
from pikv_ds.routers.scramble import scramble
from pikv_ds.store import LayerStore

KEPT = 128


@ROUTERS.register("shuffle")
class Shuffle(PageBounds):
    """Control: page bounds asked with the query of another position of the request, so that pages keep their popularity.

    score as in `bounds`, for a query drawn from the latest 128 of its row (same layer and heads). What `bounds` holds more of the attention
    than this, it owes to the query. Bytes: those of bounds.
    """

    def __init__(self, *, metadata: Literal["fp32", "bf16", "fp16"] = "bf16") -> None:
        super().__init__(metadata=metadata)
        self.earlier: dict[int, Tensor] = {}  # layer -> [R, KEPT + 1, Hq, D], by position; the last slot takes what padding asks

    def open(self, layer: int, store: LayerStore, num_shards: int) -> None:
        super().open(layer, store, num_shards)
        self.earlier.pop(layer, None)

    def remap(self, layer: int, parent: Tensor) -> None:
        if layer in self.earlier:
            self.earlier[layer] = self.earlier[layer][parent.clamp_min(0)] * (parent >= 0).view(-1, 1, 1, 1)

    def score(self, asked: PageQuery) -> Tensor:
        if asked.layer not in self.earlier:
            self.earlier[asked.layer] = asked.q.new_zeros(asked.store.counts.shape[0], KEPT + 1, *asked.q.shape[1:])
        earlier, row = self.earlier[asked.layer], asked.row_of_query()
        drawn = earlier[row, scramble(asked.positions, asked.layer) % KEPT]
        earlier[row, torch.where(asked.positions >= 0, asked.positions % KEPT, KEPT).to(torch.int64)] = asked.q
        return self.score_with(drawn, asked)

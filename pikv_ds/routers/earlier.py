"""The latest queries of every request, to ask with another one than the query's own: what popularity-matched controls need."""

from torch import Tensor

from pikv_ds.routers.base import PageQuery
from pikv_ds.routers.scramble import scramble

KEPT = 128


class EarlierQueries:
    """Owns per layer [R, KEPT + 1, Hq, D], by position modulo KEPT; the last slot takes what padding asks."""

    def __init__(self) -> None:
        self.queries: dict[int, Tensor] = {}

    def open(self, layer: int) -> None:
        self.queries.pop(layer, None)

    def remap(self, layer: int, parent: Tensor) -> None:
        if layer in self.queries:
            self.queries[layer] = self.queries[layer][parent.clamp_min(0)] * (parent >= 0).view(-1, 1, 1, 1)

    def swap(self, asked: PageQuery) -> Tensor:
        """[Q, Hq, D]: for each query one drawn from the latest KEPT of its row, 0 where there is none yet. Keeps the queries themselves."""
        if asked.layer not in self.queries:
            self.queries[asked.layer] = asked.q.new_zeros(asked.store.counts.shape[0], KEPT + 1, *asked.q.shape[1:])
        earlier, row = self.queries[asked.layer], asked.row_of_query()
        drawn = earlier[row, scramble(asked.positions, asked.layer) % KEPT]
        real = asked.positions >= 0
        earlier[row, (asked.positions % KEPT).masked_fill(~real, KEPT).long()] = asked.q
        return drawn

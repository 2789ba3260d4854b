"""What the latest queries of every request were or did, to take another one's: what popularity-matched controls need."""

import torch
from torch import Tensor

from pikv_ds.routers.base import PageQuery, TurnedEntries
from pikv_ds.routers.scramble import scramble

KEPT = 128


class Earlier:
    """Owns per layer [R, KEPT + 1, ...], by position modulo KEPT; the last slot takes what belongs to padding."""

    def __init__(self) -> None:
        self.kept: dict[int, Tensor] = {}

    def open(self, layer: int) -> None:
        self.kept.pop(layer, None)

    def remap(self, layer: int, parent: Tensor) -> None:
        if layer in self.kept:
            old = self.kept[layer]
            self.kept[layer] = old[parent.clamp_min(0)] * (parent >= 0).view(-1, *[1] * (old.dim() - 1))

    def turned(self, layer: int, new: TurnedEntries) -> None:
        """Where queries are kept, [R, KEPT + 1, Hq, r]."""
        if layer in self.kept:
            kept = self.kept[layer]
            by_head = kept[new.rows].float().unflatten(2, (new.turn.shape[1], -1))
            kept[new.rows] = torch.einsum("nkhgr,nhrs->nkhgs", by_head, new.turn).flatten(2, 3).to(kept.dtype)

    def swap(self, asked: PageQuery, own: Tensor) -> Tensor:
        """own [Q, ...] -> for each query that of one drawn from the latest KEPT of its row, 0 where there is none yet. Keeps own."""
        if asked.layer not in self.kept:
            self.kept[asked.layer] = own.new_zeros(asked.store.counts.shape[0], KEPT + 1, *own.shape[1:])
        earlier, row = self.kept[asked.layer], asked.row_of_query()
        drawn = earlier[row, scramble(asked.positions, asked.layer) % KEPT]
        real = asked.positions >= 0
        earlier[row, (asked.positions % KEPT).masked_fill(~real, KEPT).long()] = own
        return drawn

"""What the latest queries of every request were or did, to take another one's: what popularity-matched controls need."""

import torch
from torch import Tensor

from pikv_ds.pages.rows import RowColumn, Rows
from pikv_ds.routers.base import PageChange, PageQuery
from pikv_ds.routers.scramble import scramble

KEPT = 128


class Earlier:
    """Keeps per layer and row [KEPT + 1, ...], by position modulo KEPT; the last slot takes what belongs to padding."""

    def __init__(self) -> None:
        self.kept: dict[int, RowColumn] = {}

    def open(self, layer: int, rows: Rows) -> None:
        self.rows = rows
        self.kept.pop(layer, None)

    def rebuilt(self, change: PageChange) -> None:
        """Where queries are kept, [R, KEPT + 1, Hq, r]: they go into the basis of the keys."""
        if change.basis is not None and change.layer in self.kept:
            (rows, by), kept = change.basis, self.kept[change.layer].value
            by_head = kept[rows].float().unflatten(2, (by.shape[1], -1))
            kept[rows] = torch.einsum("nkhgr,nhrs->nkhgs", by_head, by).flatten(2, 3).to(kept.dtype)

    def swap(self, asked: PageQuery, own: Tensor) -> Tensor:
        """own [Q, ...] -> for each query that of one drawn from the latest KEPT of its row, 0 where there is none yet. Keeps own."""
        if asked.layer not in self.kept:
            self.kept[asked.layer] = self.rows.tensor(f"{asked.layer}.earlier", (KEPT + 1, *own.shape[1:]), own.dtype)
        earlier, row = self.kept[asked.layer].value, asked.row_of_query()
        drawn = earlier[row, scramble(asked.positions, asked.layer) % KEPT]
        real = asked.positions >= 0
        earlier[row, (asked.positions % KEPT).masked_fill(~real, KEPT).long()] = own
        return drawn

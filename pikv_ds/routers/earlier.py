"""What the latest queries of every request were or did, to take another one's: what popularity-matched controls need."""

import torch
from torch import Tensor

from pikv_ds.pages.rows import Rows
from pikv_ds.routers.base import PageChange, PageQuery
from pikv_ds.routers.memory import Asked, Memory
from pikv_ds.routers.scramble import scramble

KEPT = 128


class Earlier:
    """Keeps per layer and row [KEPT + 1, ...], by position modulo KEPT; the last slot takes what belongs to padding."""

    def __init__(self) -> None:
        self.memory = Memory(self._learn)
        self.kept = self.memory.columns

    def open(self, layer: int, rows: Rows) -> None:
        self.rows = rows
        self.kept.pop(layer, None)

    def rebuilt(self, change: PageChange) -> None:
        """Where queries are kept, [R, KEPT + 1, Hq, r]: they go into the basis of the keys."""
        if change.basis is not None and change.layer in self.kept:
            rows, by = change.basis

            def turn(x: Tensor, own: Tensor) -> Tensor:
                place = torch.full((max(int(rows.max()), int(own.max())) + 1,), -1, device=rows.device)
                place = place.index_copy_(0, rows, torch.arange(len(rows), device=rows.device))[own]
                turned = torch.einsum("nkhgr,nhrs->nkhgs", x.float().unflatten(2, (by.shape[1], -1)), by[place.clamp_min(0)])
                return torch.where((place >= 0).view(-1, 1, 1, 1), turned.flatten(2, 3).to(x.dtype), x)

            self.memory.rebase(change.layer, turn)

    def swap(self, asked: PageQuery, own: Tensor) -> Tensor:
        """own [Q, ...] -> for each query that of one drawn from the latest KEPT of its row, 0 where there is none yet. Keeps own."""
        if asked.layer not in self.kept:
            self.kept[asked.layer] = self.rows.tensor(f"{asked.layer}.earlier", (KEPT + 1, *own.shape[1:]), own.dtype)
        earlier, row = self.kept[asked.layer].value, asked.row_of_query()
        drawn = earlier[row, scramble(asked.positions, asked.layer) % KEPT]
        self.memory.add(asked.asked, own)
        return drawn

    def _learn(self, asked: Asked, own: Tensor) -> None:
        first, real = torch.arange(asked.rows.start, asked.rows.stop, device=own.device).unsqueeze(1), asked.positions >= 0
        row = first.expand_as(asked.by_row(real)).flatten()
        self.kept[asked.layer].value[row, (asked.positions % KEPT).masked_fill(~real, KEPT).long()] = own

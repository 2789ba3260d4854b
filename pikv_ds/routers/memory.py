"""What a router remembers of the queries of a row: it follows the row, and forgets queries that a crop takes back."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pikv_ds.pages.rows import RowColumn


class Asked(NamedTuple):
    """Q queries of one layer, those of a row one after the other."""

    layer: int
    rows: slice
    positions: Tensor
    """[Q] int32, -1 = padding, or taken back."""

    def by_row(self, x: Tensor) -> Tensor:
        """[Q, ...] -> [R, T, ...]."""
        return x.unflatten(0, (self.rows.stop - self.rows.start, -1))

    def mean(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [Q, ...] f32 -> its mean over the real queries of each row, [R, ...], 0 where there is none; [R] whether there is one."""
        real = self.by_row(self.positions >= 0).to(x.dtype)
        count = real.sum(1)
        total = torch.einsum("rt,rt...->r...", real, self.by_row(x))
        return total / count.clamp_min(1).view(-1, *[1] * (x.dim() - 1)), count > 0

    def without(self, kept: Tensor) -> Asked:
        """The queries that stay when rows go on with `kept` [all rows] tokens."""
        stays = self.by_row(self.positions) < kept[self.rows].unsqueeze(1)
        return self._replace(positions=torch.where(stays.flatten(), self.positions, -1))


class Memory:
    """Row columns of all layers that queries change, and how. In a forward that may be taken back it keeps what was there before."""

    def __init__(self, learn: Callable[[Asked, Tensor], None]) -> None:
        """learn(asked, x [Q, ...]): bring columns[asked.layer].value up to date, in place; what is not real must change nothing."""
        self.learn = learn
        self.columns: dict[int, RowColumn] = {}
        self.tentative = False
        self._before: dict[int, Tensor] = {}
        self._said: list[tuple[Asked, Tensor]] = []

    @property
    def waiting(self) -> list[Tensor]:
        """What is kept to forget by."""
        return [*self._before.values(), *(x for asked, own in self._said for x in (asked.positions, own))]

    def clear(self) -> None:
        self._before, self._said = {}, []

    def add(self, asked: Asked, x: Tensor) -> None:
        """Queries were asked. Sync: none."""
        if self.tentative:
            if asked.layer not in self._before:
                self._before[asked.layer] = self.columns[asked.layer].value.clone()
            self._said.append((asked, x))
        self.learn(asked, x)

    def rebase(self, layer: int, turn: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Queries are remembered in another basis: turn(x [n, ..., Hq, D] of n rows, their numbers [n]) gives them in it. Host phase."""
        at = lambda x, first: torch.arange(first, first + len(x), device=x.device)  # noqa: E731
        for own in (x for x in (self._before.get(layer), self.columns[layer].value) if x is not None):
            own.copy_(turn(own, at(own, 0)))
        for i, (asked, x) in enumerate(self._said):
            if asked.layer == layer:
                by_row = asked.by_row(x)
                self._said[i] = asked, turn(by_row, at(by_row, asked.rows.start)).reshape(x.shape)

    def settle(self, kept: Tensor) -> None:
        """Rows [R] go on with `kept` tokens of the last forward. Before they change."""
        for layer, before in self._before.items():
            self.columns[layer].value.copy_(before)
        for asked, x in self._said:
            self.learn(asked.without(kept), x)
        self.clear()

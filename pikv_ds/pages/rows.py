"""State of request rows, declared by whoever keeps it: forks, crops, drops and restarts move all of it in one place. R rows. Host phase."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pikv_ds.modes import eager, lasting
from pikv_ds.step.agreement import Agreed

Follow = Callable[[int, int, bool], int]
"""(number of the earlier row, tokens that the new one keeps of it, whether further rows continue it) -> number of the new row."""


class RowChange(NamedTuple):
    """Row i of the next forward continues row parent[i] of the last one (-1: it is new) up to token keep[i]."""

    parent: list[int]
    keep: list[int]
    lens: list[int]
    """Tokens of every row before."""
    index: Tensor
    """`parent`, [R] int64 on the device."""
    num_parked: int = 0
    """The last rows are parked (pages/parked.py), and `parent` and `lens` number the parked rows of before behind the others."""

    @classmethod
    def of(cls, agreed: Agreed, lens: list[int], parked_lens: list[int], device: torch.device) -> RowChange:
        """lens, parked_lens: tokens of the active rows of before, and of the parked ones."""
        parked = agreed.parked
        if parked is None:  # they stay
            parked = [(len(lens) + i, n) for i, n in enumerate(parked_lens)]
        parent, keep = (given + [row[at] for row in parked] for at, given in enumerate((agreed.parent, agreed.keep)))
        return cls(parent, keep, lens + parked_lens, torch.tensor(parent, dtype=torch.int64).to(device), len(parked))

    def tensor(self, x: Tensor, dim: int = 0) -> Tensor:
        """Rows of x [..., R, ...] along `dim` as they go on; 0 for new ones."""
        if not x.shape[dim]:
            return x.new_zeros(*x.shape[:dim], self.index.numel(), *x.shape[dim + 1 :])
        kept = x.index_select(dim, self.index.clamp_min(0))
        return kept.masked_fill_((self.index < 0).view(-1, *[1] * (x.dim() - 1 - dim)), 0)


def keeps(value: int, keep: int, shared: bool) -> int:
    return value


def least(value: int, keep: int, shared: bool) -> int:
    """No more than the tokens that are kept."""
    return min(value, keep)


def forgets(value: int, keep: int, shared: bool) -> int:
    return 0


class CopiedRows(NamedTuple):
    """Everything that is kept of rows, by name. ints: [R] each. tensors: [R, ...] each, those that were used. beside: of no row."""

    ints: dict[str, list[int]]
    tensors: dict[str, Tensor]
    beside: dict[str, Tensor]


class IntColumn:
    """A number per row, on the host, 0 for a new row. values: [R]."""

    def __init__(self, follow: Follow) -> None:
        self.follow = follow
        self.values: list[int] = []
        self._parked: list[int] = []

    def start(self, num_rows: int) -> None:
        self.values, self._parked = [0] * num_rows, []

    def change(self, change: RowChange) -> None:
        rows = zip(change.parent, change.keep, strict=True)
        self.values = [0 if p < 0 else self.follow(self.values[p], n, change.parent.count(p) > 1) for p, n in rows]

    def join(self) -> None:
        self.values = self.values + self._parked

    def split(self, active: int) -> None:
        self.values, self._parked = self.values[:active], self.values[active:]


class RowColumn:
    """A tensor per row, [R, *shape], 0 for a new row; allocated when it is first asked for."""

    def __init__(self, device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, empties: bool) -> None:
        """empties: a row that keeps no token of the one it continues starts at 0, too."""
        self.device, self.shape, self.dtype, self.empties = device, shape, dtype, empties
        self.num_rows = self._num_parked = 0
        self._value: Tensor | None = None
        self._parked: Tensor | None = None

    @property
    def value(self) -> Tensor:
        """May be changed in place or set anew. Sync: none."""
        if self._value is None:
            self._value = self._zeros()
        return self._value

    @value.setter
    def value(self, x: Tensor) -> None:
        assert x.shape[0] == self.num_rows, (x.shape, self.num_rows)
        self._value = lasting(x) if x.is_inference() else x

    @eager
    def _zeros(self) -> Tensor:
        return torch.zeros(self.num_rows, *self.shape, dtype=self.dtype, device=self.device)

    @property
    def used(self) -> bool:
        """Whether something was kept since the generation began."""
        return self._value is not None

    def start(self, num_rows: int) -> None:
        self.num_rows, self._value = num_rows, None
        self._num_parked, self._parked = 0, None

    def change(self, change: RowChange) -> None:
        self.num_rows = change.index.numel()
        if self._value is None:
            return
        self._value = change.tensor(self._value)
        if self.empties and not all(change.keep):
            new = torch.tensor([n == 0 for n in change.keep]).to(self.device)
            self._value.masked_fill_(new.view(-1, *[1] * len(self.shape)), 0)

    def join(self) -> None:
        """Parked rows stand behind the others (pages/parked.py)."""
        if self._value is not None or self._parked is not None:
            parked = self.value.new_zeros(self._num_parked, *self.shape) if self._parked is None else self._parked
            self._value = torch.cat([self.value, parked])
        self.num_rows += self._num_parked

    def split(self, active: int) -> None:
        """The first `active` rows are active, the others parked."""
        self._num_parked, self.num_rows = self.num_rows - active, active
        if self._value is not None:
            self._value, self._parked = self._value[:active].clone(), self._value[active:].clone()

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self._value, self._parked) if x is not None)


class Rows:
    """The columns of all rows of a cache. A column that is declared again is a new one, and the old one is forgotten."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.num_rows = device, 0
        self.version = 0
        """Another one after every change of rows."""
        self._ints: dict[str, IntColumn] = {}
        self._tensors: dict[str, RowColumn] = {}
        self._beside: dict[str, tuple[Tensor, float]] = {}
        self._limits: list[Callable[[RowChange], None]] = []
        self._undeclared: set[str] = set()
        """Tensors that were put, and that nobody has declared yet: some methods do it in a forward."""

    def ints(self, name: str, follow: Follow = keeps) -> IntColumn:
        """A number per row. follow: what becomes of it in a row that goes on."""
        column = self._ints[name] = IntColumn(follow)
        column.start(self.num_rows)
        return column

    def tensor(self, name: str, shape: tuple[int, ...] = (), dtype: torch.dtype = torch.float32, *, empties: bool = False) -> RowColumn:
        """[R, *shape] of `dtype`."""
        put = self._tensors[name] if name in self._undeclared else None
        column = self._tensors[name] = RowColumn(self.device, tuple(shape), dtype, empties)
        column.start(self.num_rows)
        self._undeclared.discard(name)
        if put is not None and (put.shape, put.dtype) == (column.shape, dtype):
            column.value = put.value
        return column

    def beside(self, name: str, shape: tuple[int, ...], fill: float = 0.0) -> Tensor:
        """[*shape] f32, `fill` in a new generation: what does not follow rows. To be changed in place."""
        self._beside[name] = torch.full(shape, fill, dtype=torch.float32, device=self.device), fill
        return self._beside[name][0]

    def limit(self, check: Callable[[RowChange], None]) -> None:
        """`check` may refuse a change, by raising on all ranks alike; all checks run before anything moves."""
        self._limits.append(check)

    def start(self, num_rows: int) -> None:
        """A generation of `num_rows` new rows begins: nothing of the last one stays."""
        self.num_rows, self.version = num_rows, self.version + 1
        for name in self._undeclared:
            del self._tensors[name]
        self._undeclared = set()
        for column in (*self._ints.values(), *self._tensors.values()):
            column.start(num_rows)
        for kept, fill in self._beside.values():
            kept.fill_(fill)

    def check(self, change: RowChange) -> None:
        for limit in self._limits:
            limit(change)

    def change(self, change: RowChange) -> None:
        """Rows are forked, cropped, dropped or new. After `check`."""
        self.num_rows, self.version = change.index.numel(), self.version + 1
        for column in (*self._ints.values(), *self._tensors.values()):
            column.change(change)

    def join(self) -> None:
        """Parked rows stand behind the others, as in tables (pages/parked.py)."""
        for column in (*self._ints.values(), *self._tensors.values()):
            column.join()

    def split(self, active: int) -> None:
        """The first `active` rows are active, the others parked."""
        self.num_rows, self.version = active, self.version + 1
        for column in (*self._ints.values(), *self._tensors.values()):
            column.split(active)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that are kept."""
        return sum(kept.nbytes for kept in (*self._tensors.values(), *(kept for kept, _ in self._beside.values())))

    # ---- copies (pikv_ds/sessions) -------------------------------------------------------------------------------------------

    def copied(self) -> CopiedRows:
        """Copies of what is kept; what a row forgets when it changes is 0, for it may be this rank's alone."""
        return CopiedRows(
            {name: [0 if column.follow is forgets else n for n in column.values] for name, column in self._ints.items()},
            {name: column.value.clone() for name, column in self._tensors.items() if column.used},
            {name: kept.clone() for name, (kept, _) in self._beside.items()},
        )

    def put(self, copied: CopiedRows) -> None:
        """Rows of a copy take the place of new ones, after `start` of as many. Raises: KeyError for numbers that nobody has declared."""
        for name, values in copied.ints.items():
            self._ints[name].values = list(values)
        for name, x in copied.tensors.items():
            if name not in self._tensors:
                self.tensor(name, tuple(x.shape[1:]), x.dtype)
                self._undeclared.add(name)
            self._tensors[name].value = x.clone()
        for name, x in copied.beside.items():
            self._beside[name][0].copy_(x)

    @property
    def int_names(self) -> set[str]:
        return set(self._ints)

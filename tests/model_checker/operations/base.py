"""What an operation is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from hypothesis import strategies as st

from tests.harness.parking import Source
from tests.model_checker.world import Change, World

MAX_ROWS, MAX_TOKENS = 3, 48

OPERATIONS: dict[str, Operation] = {}


class Operation(ABC):
    """Draws what it does from `data`, does it to the world, and leaves the invariants to the machine."""

    name: ClassVar[str]

    @abstractmethod
    def possible(self, world: World) -> bool:
        """Whether it may happen now. Not called of a world that is broken, but for operations that mend it (`mends`)."""

    mends: ClassVar[bool] = False

    @abstractmethod
    def apply(self, world: World, data: st.DataObject) -> None:
        """Raises: AssertionError for what must not be."""


def operation(cls: type[Operation]) -> type[Operation]:
    """Register it under its file's name."""
    cls.name = cls.__module__.rpartition(".")[2]
    OPERATIONS[cls.name] = cls()
    return cls


def running(world: World) -> bool:
    return not world.fresh and world.longest < MAX_TOKENS


def draw_new(world: World, data: st.DataObject, counts: list[int], most: int) -> list[list[int]]:
    """Tokens for so many rows of every source; every rank brings one at least."""
    return [data.draw(st.lists(st.integers(0, most), min_size=n, max_size=n).filter(any), label="new tokens") for n in counts]


def draw_sources(data: st.DataObject, lengths: list[int], least: int, most: int, crops: bool) -> list[Source]:
    """Rows to go on as, each up to some token."""
    rows = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=least, max_size=most), label="parents") if lengths else []
    return [(row, data.draw(st.integers(0, lengths[row]), label="kept") if crops else lengths[row]) for row in rows]


def unchanged(world: World) -> list[Change]:
    return [Change(rows=[(i, row.length) for i, row in enumerate(rows)]) for rows in world.rows]

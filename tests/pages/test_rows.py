"""Declared state of rows follows forks, crops, drops and restarts: against lists."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pikv_ds.pages.rows import RowChange, Rows, forgets, least
from pikv_ds.routers.base import Router
from pikv_ds.step.agreement import Agreed

CPU = torch.device("cpu")


def change(parent: list[int], keep: list[int], lens: list[int]) -> RowChange:
    return RowChange.of(Agreed([(len(parent), 1)], parent, keep, [1] * len(parent), False, False), lens, [], CPU)


@st.composite
def changes(draw) -> tuple[int, list[tuple[list[int], list[int]]]]:
    num_rows = first = draw(st.integers(1, 4))
    steps = []
    for _ in range(draw(st.integers(1, 4))):
        parent = draw(st.lists(st.integers(-1, num_rows - 1), min_size=1, max_size=5))
        keep = [draw(st.integers(0, 9)) if p >= 0 else 0 for p in parent]
        steps.append((parent, keep))
        num_rows = len(parent)
    return first, steps


@given(changes())
def test_columns_follow_their_rows(drawn):
    first, steps = drawn
    rows = Rows(CPU)
    kept, low, gone = rows.ints("kept"), rows.ints("low", least), rows.ints("gone", forgets)
    whole, until_empty = rows.tensor("whole", (2,)), rows.tensor("until empty", (), torch.int64, empties=True)
    rows.start(first)
    names = list(range(1, first + 1))  # what a row is called, 0 = new
    kept.values, low.values, gone.values = list(names), [5] * first, [7] * first
    whole.value = torch.tensor(names, dtype=torch.float32).view(-1, 1).expand(-1, 2).clone()
    until_empty.value = torch.tensor(names)
    lows, alive = [5] * first, list(names)
    for parent, keep in steps:
        rows.change(change(parent, keep, [9] * len(names)))
        alive = [alive[p] if p >= 0 and n else 0 for p, n in zip(parent, keep, strict=True)]
        lows = [min(lows[p], n) if p >= 0 else 0 for p, n in zip(parent, keep, strict=True)]
        names = [names[p] if p >= 0 else 0 for p in parent]
        assert kept.values == names and low.values == lows and gone.values == [0] * len(names)
        assert whole.value.tolist() == [[name, name] for name in names] and until_empty.value.tolist() == alive
        assert rows.num_rows == len(names) and rows.nbytes == whole.value.nbytes + until_empty.value.nbytes
    rows.start(2)
    assert kept.values == [0, 0] and rows.nbytes == 0 and whole.value.tolist() == [[0, 0]] * 2


def test_a_column_takes_no_memory_before_it_is_used_and_keeps_its_rows_then():
    rows = Rows(CPU)
    column, beside = rows.tensor("x", (3,)), rows.beside("y", (4,), 0.5)
    rows.start(2)
    assert rows.nbytes == beside.nbytes == 16 and not column.used
    rows.change(change([1, 0, -1], [4, 4, 0], [4, 4]))
    assert column.value.shape == (3, 3) and rows.nbytes == 16 + 36
    beside += 1
    rows.change(change([0], [4], [5, 5, 1]))
    assert beside.tolist() == [1.5] * 4, "what is kept beside rows does not follow them"
    rows.start(1)
    assert beside.tolist() == [0.5] * 4


def test_a_limit_refuses_before_anything_moves():
    rows = Rows(CPU)
    numbers = rows.ints("numbers")
    rows.start(2)
    numbers.values = [3, 4]

    def refuse(asked: RowChange) -> None:
        if min(asked.keep) < 2:
            raise RuntimeError(f"crop to {min(asked.keep)}")

    rows.limit(refuse)
    rows.check(change([1, 0], [2, 2], [4, 4]))
    with pytest.raises(RuntimeError, match="crop to 1"):
        rows.check(change([1, 0], [2, 1], [4, 4]))
    assert numbers.values == [3, 4]


def test_a_router_that_moves_its_rows_itself_is_told_how_it_is_done_now():
    with pytest.raises(TypeError, match=r"router Old defines remap, which nobody calls .* with rows.tensor"):

        class Old(Router):
            def remap(self, layer, parent): ...

            def score(self, asked): ...

"""Who lies in staging: what was asked for last stays while it is read, what is fetched ahead never takes its slots."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from pikv_ds.pages.staged import Staged


@pytest.fixture
def thread():
    with ThreadPoolExecutor(1) as one:
        yield one


def staged(slots: int, thread=None) -> tuple[Staged, np.ndarray]:
    memory = np.full(slots, -1)

    def fetch(far, places):
        if 99 in far:
            raise OSError("page 99")
        memory[places] = far

    found = Staged(SimpleNamespace(num_staged=slots, thread=thread), fetch)
    found.widen(100)
    return found, memory


def check(found: Staged, memory: np.ndarray) -> None:
    for far, slot in enumerate(found.slot):
        assert slot < 0 or (found.held[slot] == far and memory[slot] == far)


def test_the_longest_unused_makes_room():
    found, memory = staged(4)
    for pages in ([1, 2], [3, 4], [2], [5, 6]):
        found.bring(np.array(pages))
        check(found, memory)
    assert sorted(found.held) == [2, 4, 5, 6] or sorted(found.held) == [2, 3, 5, 6]
    assert (found.wanted, found.fetched) == (7, 6)


def test_what_is_fetched_ahead_leaves_what_is_read(thread):
    found, memory = staged(6, thread)
    found.bring(np.array([1, 2, 3, 4]))
    found.foresee(lambda most: np.arange(10, 10 + most))
    found.wait()
    assert {1, 2, 3, 4} <= set(found.held) and found.ahead == 2
    check(found, memory)
    found.bring(np.array([10, 20]))
    assert found.used_ahead == 1
    check(found, memory)


def test_a_page_that_can_not_be_read_is_not_staged(thread):
    found, memory = staged(4, thread)
    found.bring(np.array([1, 2]))
    with pytest.raises(OSError, match="page 99"):
        found.bring(np.array([98, 99]))
    assert found.slot[98] == found.slot[99] == -1
    found.bring(np.array([99]), wait=False)
    with pytest.raises(OSError, match="page 99"):
        found.bring(np.array([1]))
    found.bring(np.array([1]))
    check(found, memory)
    found.bring(np.array([99]), wait=False)
    found.close()

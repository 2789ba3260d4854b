"""Who lies in staging: what was asked for last stays while it is read, what is fetched ahead never takes its slots."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pikv_ds.pages.staged import Staged


@pytest.fixture
def thread():
    with ThreadPoolExecutor(1) as one:
        yield one


def staged(slots: int, thread=None) -> tuple[Staged, np.ndarray]:
    memory = np.full(slots, -1)

    def fetch(coming, sections):
        if 99 in coming[:, 0]:
            raise OSError("page 99")
        memory[coming[:, 1]] = coming[:, 0]

    found = Staged(SimpleNamespace(num_near=2, num_staged=slots, thread=thread), fetch)
    found.widen(100)
    return found, memory


def check(found: Staged, memory: np.ndarray) -> None:
    for far, slot in enumerate(found.slot[0]):
        assert slot < 0 or (found.held[0, slot] == far and memory[slot] == far)


def foresee(found: Staged, pages: list[int], most: int) -> None:
    """The first of these scores best."""
    ids = torch.tensor(pages, dtype=torch.int32).view(1, 1, -1) + 2 + found.num_slots
    found.foresee(-torch.arange(len(pages)).float().view(1, 1, -1), torch.zeros(1, len(pages), dtype=torch.bool), ids, most)


def test_the_longest_unused_makes_room():
    found, memory = staged(4)
    for pages in ([1, 2], [3, 4], [2], [5, 6]):
        found.bring(np.array(pages))
        check(found, memory)
    assert sorted(found.held[0]) == [2, 4, 5, 6] or sorted(found.held[0]) == [2, 3, 5, 6]
    assert (found.wanted, found.fetched) == (7, 6)


def test_what_is_fetched_ahead_leaves_what_is_read(thread):
    found, memory = staged(6, thread)
    found.bring(np.array([1, 2, 3, 4]))
    foresee(found, [10, 3, 11, 12, 13], most=6)
    found.wait()
    assert {1, 2, 3, 4, 10, 11} == set(found.held[0]) and found.ahead == 2
    check(found, memory)
    found.bring(np.array([10, 20]))
    assert found.used_ahead == 1
    check(found, memory)


def test_a_page_that_can_not_be_read_is_not_staged(thread):
    found, memory = staged(4, thread)
    found.bring(np.array([1, 2]))
    with pytest.raises(OSError, match="page 99"):
        found.bring(np.array([98, 99]))
    assert found.slot[0, 98] == found.slot[0, 99] == -1
    found.bring(np.array([99]), wait=False)
    with pytest.raises(OSError, match="page 99"):
        found.bring(np.array([1]))
    found.bring(np.array([1]))
    check(found, memory)
    found.bring(np.array([99]), wait=False)
    found.close()


def test_sections_have_slots_of_their_own():
    """A head's page takes no room of another head's, and comes for that head alone."""
    came = []
    found = Staged(SimpleNamespace(num_near=2, num_staged=3, thread=None), lambda coming, sections: came.append(coming.tolist()))
    found.widen(20)
    found.divide(2)
    ids = torch.arange(20, dtype=torch.int32).view(1, 1, -1) + 5
    first = found.serve(ids, torch.tensor([[[1, 2, 3], [4, 5, -1]]], dtype=torch.int32))
    assert first.left is None and [one[::2] for one in came[0]] == [[1, 0], [2, 0], [3, 0], [4, 1], [5, 1]]
    found.serve(ids, torch.tensor([[[1, 2, 3], [1, 4, -1]]], dtype=torch.int32))
    assert [one[::2] for one in came[1]] == [[1, 1]] and (found.wanted, found.fetched) == (10, 6)
    served = found.serve(ids, torch.tensor([[[6, 7, 8], [4, 5, 1]]], dtype=torch.int32))
    more = found.serve(ids, torch.tensor([[[6, 7, 9], [9, 10, 11]]], dtype=torch.int32))
    assert served.left is None and more.left is None and sorted(found.held[1]) == [9, 10, 11]
    found.divide(1)
    assert found.held.shape == (1, 3) and (found.held == -1).all()

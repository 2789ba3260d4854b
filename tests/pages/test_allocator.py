"""The allocator alone against a list of uses: who takes, shares, lets go and is told."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pikv_ds.pages.addresses import Addresses
from pikv_ds.pages.allocator import GROWTH, PageAllocator


class Model:
    """An allocator and what it must say: uses[page]."""

    def __init__(self) -> None:
        self.told: list[list[int]] = []
        self.allocator = PageAllocator(
            torch.device("cpu"), torch.tensor(0), lambda freed: self.told.append(freed.nonzero().flatten().tolist()), Addresses()
        )
        self.uses: list[int] = []

    def check(self) -> None:
        assert self.allocator.refcount[:-1].tolist() == self.uses
        free = self.allocator.free_stack[: int(self.allocator.free_top)].tolist()
        assert sorted(free) == [page for page, uses in enumerate(self.uses) if not uses]
        assert self.allocator.used.tolist() == [uses > 0 for uses in self.uses]

    def add(self, draw, some) -> None:
        self.allocator.add(count := draw(st.integers(1, 5)))
        self.uses += [0] * count

    def take(self, draw, some) -> None:
        count = draw(st.integers(0, self.uses.count(0)))
        uses = torch.tensor(draw(st.lists(st.integers(1, 3), min_size=count, max_size=count)), dtype=torch.int32)
        alike = draw(st.booleans())
        ids = self.allocator.take(count, 2 if alike else uses)
        assert ids.dtype == torch.int32 and len(set(ids.tolist())) == count
        for page, named in zip(ids.tolist(), uses.tolist(), strict=True):
            assert not self.uses[page]
            self.uses[page] = 2 if alike else named

    def share(self, draw, some) -> None:
        ids = draw(st.lists(st.sampled_from(some), max_size=6)) if some else []
        self.allocator.share(torch.tensor(ids, dtype=torch.int32))
        for page in ids:
            self.uses[page] += 1

    def unshare(self, draw, some) -> None:
        ids = [page for page in some if self.uses[page] > 1]
        self.allocator.unshare(torch.tensor(ids, dtype=torch.int32))
        for page in ids:
            self.uses[page] -= 1

    def release(self, draw, some) -> None:
        ids = draw(st.lists(st.sampled_from([-1, *some]), unique=True, min_size=1))
        gone = [page >= 0 and draw(st.booleans()) for page in ids]
        self._told(lambda: self.allocator.release(torch.tensor(ids, dtype=torch.int32), torch.tensor(gone)))
        for page, left in zip(ids, gone, strict=True):
            if left:
                self.uses[page] -= 1
        self._freed()

    def recount(self, draw, some) -> None:
        ids = draw(st.lists(st.sampled_from(range(len(self.uses))), max_size=8)) if self.uses else []
        self._told(lambda: self.allocator.recount(torch.tensor(ids, dtype=torch.int64)))
        self.uses = [ids.count(page) for page in range(len(self.uses))]
        self._freed()

    def compact(self, draw, some) -> None:
        ids, keep = self.allocator.compact(len(some))
        assert keep.tolist() == some and [int(ids[page]) for page in some] == list(range(len(some)))
        self.uses = [self.uses[page] for page in some]

    def _told(self, act) -> None:
        self.before = list(self.uses)
        self.told.clear()
        act()

    def _freed(self) -> None:
        assert self.told == [[page for page, uses in enumerate(self.uses) if not uses and self.before[page]]]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_uses_are_those_of_a_list(data):
    model = Model()
    for _ in range(data.draw(st.integers(1, 10))):
        what = data.draw(st.sampled_from(["add", "take", "share", "unshare", "release", "recount", "compact"]))
        getattr(model, what)(data.draw, [page for page, uses in enumerate(model.uses) if uses])
        model.check()


@pytest.mark.parametrize("used", [0, 1, GROWTH - 1, GROWTH, 5 * GROWTH + 3])
def test_slabs_are_a_share_of_what_is_there(used):
    model = Model()
    for free in (0, 1, 2, 3, 6, 7, 8, 200):
        pages = model.allocator
        pages.refcount = torch.zeros(used + free + 1, dtype=torch.int32)
        assert pages.num_pages == used + free
        assert pages.wasteful(free) == (free > 1 + used // GROWTH)
        for needed in (0, free, free + 1, free + 400):
            slab = max(needed - free, (used + free) // GROWTH)
            assert pages.missing(free, needed) == (slab if needed > free else 0)


def test_more_than_there_is_can_not_be_taken():
    model = Model()
    model.allocator.add(2)
    with pytest.raises(AssertionError, match="reserve them first"):
        model.allocator.take(3)

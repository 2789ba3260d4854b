"""Decode steps in which no page can open reserve nothing and read no sizes back; whatever comes between, the sizes are right again."""

import pytest
import torch

from pikv_ds.pages.layers import RankPages
from pikv_ds.pages.pool import PagePool
from tests.harness.driver import Driver, layer, ragged
from tests.harness.invariants import check


@pytest.fixture
def calls(monkeypatch):
    """How often sizes were mirrored and slabs reserved since the last look."""
    seen = []
    for owner, name in ((RankPages, "mirror"), (PagePool, "reserve")):
        plain = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda self, *args, plain=plain, name=name: (seen.append(name), plain(self, *args))[1])

    def take():
        taken, seen[:] = list(seen), []
        return taken

    return take


def test_only_steps_that_may_open_a_page_look(calls):
    driver = Driver([layer(0), layer(1)], page_size=8)
    driver.prefill([5, 3])
    looked = []
    for _ in range(20):
        calls()
        driver.decode()
        looked.append(bool(calls()))
        check(driver)
    # Rows of 5 and 3 tokens: the first has 3 slots left, then the second has 2 of its 5, ...
    opens = [any((n + step) % 8 == 0 for n in (5, 3)) for step in range(20)]
    assert all(look for look, open_ in zip(looked, opens, strict=True) if open_) and sum(looked) <= sum(opens) + 6 < 20


@pytest.mark.parametrize("what", ["chunk", "fork", "crop", "idle", "generation"])
def test_what_comes_between(what, calls):
    driver = Driver([layer(0), layer(1, window=20)], page_size=8)
    driver.prefill([5, 3])
    driver.decode()
    calls()
    driver.decode()
    assert calls() == [], "this step was meant to be quiet"
    match what:
        case "chunk":
            driver.forward(ragged([9, 14]))
        case "fork":
            driver.select([1, 1, 0])
        case "crop":
            driver.crop([6, 4])
        case "idle":
            driver.forward(torch.tensor([[True], [False]]))
        case "generation":
            driver.prefill([8, 8, 8])
    for _ in range(12):
        driver.decode()
        check(driver)

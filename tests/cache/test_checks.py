"""A check that is told something else than what the cache does, or of entries that it does not hold, must say so."""

import pytest
import torch

from pikv_ds.cache.inspect import PoolProbe
from tests.harness.checks import Check, Dense, Finite
from tests.harness.driver import Driver, layer, ragged
from tests.harness.evicting import evicting, last_position
from tests.harness.heads import HeadAttention, HeadPages, Twins
from tests.harness.invariants import check, check_pages, check_unshared
from tests.harness.selecting import selecting
from tests.harness.windowed import LeastAttended, TwoPools, tiered

SMALL = {"sink_tokens": 2, "recent_tokens": 3}
STREAMING = {"method": "streaming_llm", "budget_tokens": 24, **SMALL}
HEADS = {"method": "h2o", "budget_tokens": 22, "head_budget": "adaptive", **SMALL}


def run(driver: Driver) -> None:
    driver.prefill([40, 17])
    for mask in (ragged([1, 1]), ragged([9, 4]), *[ragged([1, 1])] * 4):
        driver.forward(mask)


def forged(driver: Driver) -> Driver:
    """What the driver believes to have stored first is not what the cache got."""
    driver.prefill([40, 17])
    k, v = driver.history[0][0][0]
    driver.history[0][0][0] = (k + 1, v)
    return driver


@pytest.mark.parametrize("wrong", [Dense(), HeadAttention(), HeadPages()], ids=lambda x: type(x).__name__)
def test_another_entry_is_seen(wrong: Check):
    driver = forged(Driver([layer(0)], page_size=2, scheduling={} if isinstance(wrong, Dense) else HEADS, checks=[wrong]))
    with pytest.raises(AssertionError):
        driver.decode()


def test_another_entry_is_seen_where_some_leave_and_where_some_are_chosen():
    for driver in (evicting([layer(0)], last_position, STREAMING, page_size=3)[0], selecting([layer(0)], pages=4)[0]):
        with pytest.raises(AssertionError):
            forged(driver).decode()


def test_another_policy_is_seen():
    driver, _ = evicting([layer(0)], lambda page, *_: -page.positions[-1], STREAMING, page_size=3)
    with pytest.raises(AssertionError, match=r"layer 0, row 0"):
        run(driver)


def test_pages_that_were_left_out_are_seen():
    """The oracle reads everything, the cache's router does not."""
    routing = {"method": "bounds", "budget_pages": 4, "sink_tokens": 1, "recent_tokens": 2}
    driver, _ = evicting([layer(0)], last_position, STREAMING, page_size=3, routing=routing)
    with pytest.raises(AssertionError, match="out"):
        run(driver)


def test_another_budget_of_pages_is_seen():
    driver, selected = selecting([layer(0)], pages=4)
    selected.routing["budget_pages"] = 5
    with pytest.raises(AssertionError, match="row 0, position"):
        run(driver)


@pytest.mark.parametrize(("sinks", "recent"), [(2, 3), (5, 6)], ids=str)
def test_another_window_is_seen(sinks, recent):
    window = {"raw_sink_tokens": 2, "raw_recent_tokens": 6}
    driver = Driver([layer(0)], page_size=4, compression=window, checks=[TwoPools(sinks, recent)])
    with pytest.raises(AssertionError):
        run(driver)


def test_another_share_of_light_pages_is_seen():
    light = {"light": "none", "heavy": "none", "light_ratio": 0.3}
    driver = tiered([layer(0)], codec="adaptive", compression=light, page_size=4)
    driver.add(LeastAttended(driver.checks[0], 0.0))
    with pytest.raises(AssertionError):
        run(driver)


def test_a_head_that_keeps_more_than_its_own_cache_would_is_seen():
    """Adaptive budgets move entries between heads; the caches of single heads can't."""
    driver = Driver([layer(0)], page_size=2, scheduling=HEADS, checks=[Twins()])
    with pytest.raises(AssertionError, match="table"):
        run(driver)


def test_answers_that_are_no_numbers_are_seen():
    out = torch.full((1, 1, 4, 8), torch.nan)
    with pytest.raises(AssertionError):
        Finite().layer(0, out, torch.zeros(1, 1), out, out[..., 0])


class Forged(PoolProbe):
    """Says that every page is named once more than it is."""

    @property
    def uses(self) -> torch.Tensor:
        return super().uses + 1


def test_invariants_see_what_is_lost_or_shared():
    driver = Driver([layer(0)], page_size=4, num_shards=2)
    driver.prefill([9])
    check(driver)
    pool = Forged(driver.probe.near_pool(0).pool)
    with pytest.raises(AssertionError, match="reference counts"):
        check_pages(pool)
    with pytest.raises(AssertionError, match="an open page is shared"):
        check_unshared(pool)
    driver.reference.rows[0][0].pop()
    with pytest.raises(AssertionError):
        check(driver)

"""What a cache holds between forwards is what it reports; after reset() it is as a new one, whatever was stored."""

import pytest
import torch

from pikv_ds.cache.stats import stats
from pikv_ds.routers import ROUTERS
from tests.harness.checks import Dense
from tests.harness.driver import Driver, layer, ragged
from tests.held import check_bytes
from tests.routing_blocks import routing
from tests.unrotated import unrotated

KINDS = [layer(0, dim=16), layer(1, dim=16, window=20)]
KEPT = {"sink_tokens": 2, "recent_tokens": 6}
EVICTING = {"budget_tokens": 40} | KEPT
READING = {"budget_pages": 4} | KEPT
NEAR = {"raw_sink_tokens": 2, "raw_recent_tokens": 8}
ADAPTIVE = {"method": "adaptive", "light": "none", "heavy": "fp8_e4m3", "light_ratio": 0.3, **NEAR}
CASES = {
    "plain": {},
    "shards": {"num_shards": 4, "placement": "position"},
    "groups": {"compression": {"method": "int4", "group": 32}, "page_size": 32},
    "h2o": {"scheduling": {"method": "h2o"} | EVICTING},
    "adakv": {"scheduling": {"method": "adakv"} | EVICTING},
    "pages of one": {"page_size": 1, "scheduling": {"method": "expected_attention"} | EVICTING},
    "heads": {"scheduling": {"method": "streaming_llm", "head_budget": "uniform"} | EVICTING},
    "watched heads": {"scheduling": {"method": "quest", "head_budget": "adaptive"} | EVICTING},
    "shuffle": {"routing": {"method": "shuffle"} | READING},
    "window": {"compression": {"method": "fp8_e4m3"} | NEAR},
    "window, evicted, chosen": {
        "compression": {"method": "fp8_e4m3"} | NEAR,
        "scheduling": {"method": "h2o", "budget_tokens": 60} | KEPT,
        "routing": {"method": "shuffle"} | READING,
    },
    "important": {"compression": ADAPTIVE},
    "important, evicted": {"compression": ADAPTIVE, "scheduling": {"method": "hazard_lru", "budget_tokens": 60} | KEPT},
    "svd": {"compression": {"method": "svd", "rank": 8}},
    "svd behind a window": {"compression": {"method": "svd", "rank": 8} | NEAR},
    "unrotated": {},
}


def driver_of(name: str, folder) -> Driver:
    options = dict(CASES[name])
    if name == "unrotated":
        options["compression"] = unrotated(KINDS, folder)
    by_head = "head_budget" in options.get("scheduling", {})  # not in layers with a window
    driver = Driver([layer(0, dim=16), layer(1, dim=16)] if by_head else KINDS, **options)
    driver.without(Dense)
    return driver


def run(driver: Driver) -> None:
    driver.prefill([50, 23])
    check_bytes(driver.cache)
    for mask in (ragged([5, 9]), *[ragged([1, 1])] * 3):
        driver.forward(mask)
        check_bytes(driver.cache)
    driver.select([1, 0, 0])
    driver.forward(ragged([1, 1, 1]))
    check_bytes(driver.cache)


def reported(driver: Driver) -> dict:
    return {name: value for name, value in stats(driver.cache, 1, 1).items() if name != "requests"}


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_every_tensor_is_counted_and_reset_drops_them(name, tmp_path):
    driver = driver_of(name, tmp_path)
    new, empty = reported(driver), check_bytes(driver.cache)
    run(driver)
    assert check_bytes(driver.cache) > 2 * empty
    driver.reset()
    assert check_bytes(driver.cache) == empty
    assert reported(driver) == new


@pytest.mark.parametrize("name", [name for name, router in ROUTERS.items() if not router.reads_all])
def test_routers_keep_nothing_over_a_reset(name, tmp_path):
    block = routing(name, tmp_path, layers=2, shards=4, query_width=4 * 16)
    driver = Driver(KINDS, routing=block, num_shards=4)
    driver.without(Dense)
    empty = check_bytes(driver.cache)
    run(driver)
    driver.reset()
    assert check_bytes(driver.cache) == empty


def test_a_restart_clears_what_a_reset_does():
    """A second generation holds what it would hold in a new cache."""
    found = []
    for before in (False, True):
        driver = driver_of("window, evicted, chosen", None)
        if before:
            run(driver)
        driver.prefill([30])
        found.append(check_bytes(driver.cache))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["plain", "h2o", "shuffle", "important", "svd behind a window"])
def test_a_forward_that_broke_off_leaves_nothing(name):
    driver = driver_of(name, None)
    empty = check_bytes(driver.cache)
    run(driver)

    writer = driver.cache.writer
    stores = writer.store

    def breaks(*arguments) -> None:
        stores(*arguments)
        raise ArithmeticError

    writer.store = breaks
    with pytest.raises(ArithmeticError):
        driver.forward(ragged([3, 1, 2]))
    del writer.store
    driver.reset()
    assert check_bytes(driver.cache) == empty

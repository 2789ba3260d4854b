"""Layers with three and four pools: what every query reads is what one pool would hold, wherever its pages are."""

import pytest
import torch

from pikv_ds.cache.stats import stats
from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.errors import ConfigError
from pikv_ds.pools import POOLS
from tests.aged import Aged
from tests.harness.checks import Dense
from tests.harness.dense import rel_error
from tests.harness.driver import Driver, layer, ragged
from tests.harness.invariants import check_pages, check_unshared
from tests.harness.windowed import run_mix
from tests.held import check_bytes

LAYERS = [layer(0, dim=16), layer(1, dim=16, window=70), layer(2, dim=16, latent=True)]
RAW = {"raw_sink_tokens": 2, "raw_recent_tokens": 6}
THREE = [{"method": "aged", "after_tokens": 16}]
FOUR = [{"method": "aged", "after_tokens": 12}, {"method": "aged", "after_tokens": 30}]

pytestmark = pytest.mark.usefixtures("nan_filled_empty")


@pytest.fixture(autouse=True)
def aged(monkeypatch):
    monkeypatch.setitem(POOLS._classes, "aged", Aged)


def ages(driver: Driver, i: int) -> list[list[list[int]]]:
    """[row][pool] positions of a layer."""
    pools = driver.probe.pools(i)
    return [[sorted(p for page in pool.pages(row) for p in page) for pool in pools] for row in range(len(driver.lens))]


@pytest.mark.parametrize("pools", [THREE, FOUR], ids=["three pools", "four pools"])
@pytest.mark.parametrize("num_shards", [1, 4], ids="shards{}".format)
def test_raw_pools_are_exact(num_shards, pools):
    """Prefill, chunks, decode, forks, announced crops and a new generation, against dense attention; every entry is in one pool."""
    driver = Driver(LAYERS, num_shards=num_shards, compression=RAW, pools=pools, placement="position")
    run_mix(driver)
    driver.prefill([90, 41])
    for _ in range(9):
        driver.decode()
    for i in (0, 2):
        assert len(driver.probe.pools(i)) == 2 + len(pools)
        for length, by_pool in zip(driver.lens, ages(driver, i), strict=True):
            assert sorted(sum(by_pool, [])) == list(range(length))
            for options, held, before in zip(pools, by_pool[2:], by_pool[1:], strict=False):
                assert max(held, default=-1) < length - options["after_tokens"]
                assert all(p >= length - options["after_tokens"] - 2 * 4 * num_shards for p in before), "an old page stayed before"
        for pool in driver.probe.pools(i):
            check_pages(pool)
            check_unshared(pool)
        assert all(by_pool[-1] for by_pool in ages(driver, i)[:1]), "nothing came to the last pool"
    assert len(driver.probe.pools(1)) == 1, "a layer with a window has one pool"
    check_bytes(driver.cache)


@pytest.mark.parametrize("num_shards", [1, 2], ids="shards{}".format)
def test_a_pool_right_behind_the_nearest(num_shards):
    """Without a raw window; forks share what lies behind, and the last of them frees it."""
    driver = Driver(LAYERS[:1], num_shards=num_shards, pools=THREE, placement="position")
    driver.prefill([50, 33])
    driver.select([0, 0, 1])
    for _ in range(12):
        driver.decode()
    behind = driver.probe.pools(0)[1]
    assert int(behind.uses.max()) == 2 and behind.used_pages > 4
    driver.select([2])
    for _ in range(3):
        driver.decode()
    assert int(behind.uses.max()) == 1
    driver.reset()
    assert driver.probe.pools(0)[1].num_pages == 0


@pytest.mark.parametrize("method", ["streaming_llm", "knorm", "h2o", "snapkv", "quest", "lru"])
def test_eviction_keeps_what_it_keeps_with_one_pool(method):
    scheduling = {"method": method, "budget_tokens": 40, "sink_tokens": 2, "recent_tokens": 3}

    def run(**pools):
        driver, found = Driver([layer(0), layer(1, latent=True)], page_size=2, num_shards=2, scheduling=scheduling, checks=[], **pools), []
        driver.prefill([70, 12])
        for mask in (*[ragged([1, 1])] * 5, ragged([9, 20]), *[ragged([1, 1])] * 5):
            outputs = driver.forward(mask)
            found.append(([sorted(sum(row, [])) for i in range(2) for row in ages(driver, i)], outputs))
        return driver, found

    (_, one), (driver, three) = run(), run(compression={"raw_recent_tokens": 8}, pools=THREE)
    assert all(any(pool.used_pages for pool in driver.probe.pools(i)[2:]) for i in range(2)), "the third pool was not used"
    for (kept, outputs), (also_kept, also_outputs) in zip(one, three, strict=True):
        assert kept == also_kept
        for (out, _), (also_out, _) in zip(outputs, also_outputs, strict=True):
            assert rel_error(torch.nan_to_num(also_out), torch.nan_to_num(out)) < 1e-5


def test_records_that_get_smaller_with_age():
    """fp32, then int8, then int4: fewer bytes than two pools, and the error of the narrowest record at most."""
    common = {"page_size": 64, "codec": "int8", "compression": {"raw_recent_tokens": 64}, "checks": []}
    two, three = (
        Driver([layer(0, dim=32)], pools=pools, **common) for pools in ([], [{"method": "aged", "after_tokens": 200, "record": "int4"}])
    )
    exact = Driver([layer(0, dim=32)], checks=[Dense()])
    outputs = []
    for driver in (exact, two, three):
        driver.steps = None  # no numbers that int8 holds exactly
        driver.prefill([700])
        outputs.append(driver.forward(torch.ones(1, 1, dtype=torch.bool))[0][0])
    fp32, int8, int4 = (pool.fmt.name for pool in three.probe.pools(0))
    assert (fp32, int8, int4) == ("fp32", "int8", "int4")
    sizes = [stats(driver.cache, 1, 701)["kv_bytes_allocated"] for driver in (exact, two, three)]
    assert sizes[0] > 2 * sizes[1] and sizes[1] > 1.2 * sizes[2], sizes
    errors = [rel_error(out, outputs[0]) for out in outputs[1:]]
    assert 0 < errors[0] < errors[1] < 0.2, errors
    assert three.probe.pools(0)[2].held[0][0] == list(range(448))


def test_a_crop_that_reaches_behind_is_refused():
    driver = Driver(LAYERS[:1], pools=THREE)
    driver.prefill([50])
    driver.crop([33])
    with pytest.raises(RuntimeError, match=r"crop to 33 of 50 tokens: entries up to token 34 may lie in a pool behind \(pikv.pools\[0\]"):
        driver.decode()


def test_a_kind_that_changes_more_than_the_record_is_refused(monkeypatch):
    monkeypatch.setattr(Aged, "pool", lambda self, before, spec, dtype: type(before)(fmt=before.fmt, always_read=False))
    with pytest.raises(ConfigError, match=r"pikv.pools\[0\].method = 'aged' gives layer 0 pages of another shape"):
        Driver(LAYERS[:1], pools=THREE)


def test_a_kind_that_answers_with_something_else_is_named(monkeypatch):
    monkeypatch.setattr(Aged, "pool", lambda self, before, spec, dtype: None)
    with pytest.raises(ConfigError, match=r"pikv.pools\[0\].method = 'aged': Aged.pool returned None; it must return a PoolPlan"):
        Driver(LAYERS[:1], pools=THREE)
    monkeypatch.setattr(Aged, "pool", lambda self, before, spec, dtype: before)
    for leaves, said in (
        (lambda pages: pages.table[..., 1:] >= 0, "torch.bool"),
        (lambda pages: pages.table, "torch.int32"),
        (lambda pages: None, "None"),
    ):
        monkeypatch.setattr(Aged, "leaves", lambda self, pages, leaves=leaves: leaves(pages))
        with pytest.raises(TypeError, match=rf"Aged.leaves of the page pool 'aged' \(pikv.pools\) returned {said}"):
            Driver(LAYERS[:1], pools=THREE).prefill([50])


def test_a_kind_that_nobody_brings_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match=r"pikv.pools\[1\].method = 'nowhere': legal is one of 'aged'"):
        PiKVConfig(pools=[*THREE, {"method": "nowhere"}])
    for given in ({"method": "aged"}, "aged", ["aged"], [{"after_tokens": 3}]):
        with pytest.raises(ConfigError, match="pikv.pools.* legal is a list of objects, each with the key 'method'"):
            PiKVConfig(pools=given)
    monkeypatch.setattr(POOLS, "_classes", {})
    with pytest.raises(
        ConfigError, match=r"pikv.pools\[0\].method = 'aged': legal is what an installed distribution brings .* there is none"
    ):
        PiKVConfig(pools=THREE)

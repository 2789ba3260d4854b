"""What every registered kind of page pool keeps. This package brings none: installed distributions are held to it."""

import inspect

import pytest

from pikv_ds.cache.stats import stats
from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.pools import POOLS
from pikv_ds.pools.base import PoolKind
from tests.harness.dense import rel_error
from tests.harness.driver import Driver, layer, ragged
from tests.harness.invariants import check_pages
from tests.held import check_bytes

pytestmark = pytest.mark.parametrize("name", POOLS.names())


def run(name: str | None, num_shards: int = 1) -> tuple[Driver, list]:
    """Forks, decoding and two generations, behind a raw window and 8-bit integers."""
    pools = [{"method": name}] if name else []
    layers = [layer(0, dim=16), layer(1, dim=16, window=70)]
    driver = Driver(
        layers, page_size=64, codec="int8", compression={"raw_recent_tokens": 16}, pools=pools, num_shards=num_shards, checks=[]
    )
    outputs = []
    for tokens in ([900, 500], [700]):
        driver.prefill(tokens)
        driver.forward(ragged([3] * len(tokens)))
        driver.select([0] * (len(tokens) + 1))
        for _ in range(6):
            outputs.append(driver.forward(ragged([1] * (len(tokens) + 1)))[0][0])
    return driver, outputs


def test_is_described(name):
    cls = POOLS.get(name)
    assert issubclass(cls, PoolKind) and cls.name == name
    assert len(inspect.getdoc(cls).splitlines()) > 2, "which pages go there, as what they are stored, at how many bytes"


def test_options_are_keywords_with_defaults(name):
    parameters = list(inspect.signature(POOLS.get(name).__init__).parameters.values())[1:]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in parameters)
    PiKVConfig(pools=[{"method": name, **{p.name: p.default for p in parameters}}])
    assert POOLS.build(name).recent_tokens >= 0


@pytest.mark.parametrize("num_shards", [1, 2], ids="shards{}".format)
def test_every_entry_is_in_one_pool_and_read(name, num_shards):
    driver, outputs = run(name, num_shards)
    recent = POOLS.build(name).recent_tokens
    assert len(driver.probe.pools(0)) == 3 and len(driver.probe.pools(1)) == 1
    for row, length in enumerate(driver.lens):
        by_pool = [[p for page in pool.pages(row) for p in page] for pool in driver.probe.pools(0)]
        assert sorted(sum(by_pool, [])) == list(range(length))
        assert max(by_pool[2], default=-1) < length - recent, "recent tokens went behind"
    for pool in driver.probe.all_pools:
        check_pages(pool)
    for out, without in zip(outputs, run(None, num_shards)[1], strict=True):
        assert rel_error(out, without) < 0.5, "what lies behind is read as something else"


def test_what_is_allocated_is_counted(name):
    driver, _ = run(name)
    check_bytes(driver.cache)
    used = [pool.used_pages for pool in driver.probe.pools(0)]
    driver.reset()
    assert used[2] and stats(driver.cache, 1, 1)["kv_bytes_allocated"] == 0

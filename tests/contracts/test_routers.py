"""What every registered KV router keeps. A router needs no test of its own to be held to this; test_selection.py does so over ranks."""

import inspect

import pytest
import torch

from pikv_ds.cache.stats import stats
from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.routers import ROUTERS
from pikv_ds.routers.base import Router
from tests.harness.checks import Finite
from tests.harness.driver import Driver, layer, ragged
from tests.held import check_bytes, held_bytes
from tests.routing_blocks import placement, routing
from tests.unrotated import unrotated

pytestmark = pytest.mark.parametrize("name", ROUTERS.names())
LAYERS = [layer(0), layer(1, window=24)]
COUNTERS = 4 * 8  # bytes: entries read and visible, attention read and queries, in f64


def recording(name: str, folder, num_shards: int = 1, placed: str | None = None, compression: dict | None = None, **own) -> Driver:
    """Compares nothing: a router may read less than dense attention does.

    placed: the router for which entries are placed, if that is another; own: options of the router.
    """
    block = routing(name, folder, layers=len(LAYERS), shards=num_shards, query_width=4 * 8, **own)
    options = placement(placed or own.get("base", name))
    return Driver(LAYERS, routing=block, num_shards=num_shards, compression=compression, checks=[Finite()], **options)


def choices(driver: Driver) -> list:
    """The pages read."""
    found = []
    driver.probe.on_choice(lambda asked, page_list: found.append(page_list))
    return found


def outputs(driver: Driver) -> list:
    driver.prefill([40, 23])
    found = [driver.forward(ragged([5, 5]))]
    driver.select([1, 1, 0])
    found += [driver.forward(torch.ones(3, 1, dtype=torch.bool)) for _ in range(9)]
    driver.announce_crops()
    driver.forward(ragged([4, 4, 4]))
    driver.crop([n - 3 for n in driver.lens])
    found.append(driver.forward(torch.ones(3, 1, dtype=torch.bool)))
    driver.prefill([9])
    return [*found, driver.forward(torch.ones(1, 1, dtype=torch.bool))]


def test_is_described(name):
    cls = ROUTERS.get(name)
    assert issubclass(cls, Router) and cls.name == name
    assert len(inspect.getdoc(cls).splitlines()) > 2, "what is read, by which formula, from which source"


def test_options_are_keywords_that_a_block_may_hold(name, tmp_path):
    parameters = list(inspect.signature(ROUTERS.get(name).__init__).parameters.values())[1:]
    assert all(p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)
    block = routing(name, tmp_path, layers=2, shards=1, query_width=32)
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}
    PiKVConfig(page_size=4, routing=block | defaults)


@pytest.mark.parametrize("num_shards", [1, 4], ids="shards{}".format)
def test_rows_that_grow_fork_and_start_anew(name, num_shards, tmp_path):
    """Finite throughout, and twice the same: nothing depends on the state of a random generator."""
    first, second = (outputs(recording(name, tmp_path, num_shards=num_shards)) for _ in range(2))
    for forward, again in zip(first, second, strict=True):
        for (out, lse), (out_again, lse_again) in zip(forward, again, strict=True):
            assert torch.equal(out, out_again) and torch.equal(lse, lse_again)


def test_keys_before_their_rotation_are_no_other_choice(name, tmp_path):
    """Pages that hold coefficients of un-rotated keys, all of them: every query reads the pages that it reads of raw ones."""
    found = []
    for compression in ({}, unrotated(LAYERS, tmp_path)):
        driver = recording(name, tmp_path, num_shards=4, compression=compression)
        pages = choices(driver)
        driver.prefill([40, 23])
        found.append(([driver.forward(ragged(new)) for new in ([5, 3], [1, 1], [1, 1])], pages))
    (raw, pages), (others, also) = found
    assert len(pages) == len(also) and all(torch.equal(x, y) for x, y in zip(pages, also, strict=True))
    for forward, other in zip(raw, others, strict=True):
        for want, got in zip(forward, other, strict=True):
            assert all(torch.allclose(x, y, atol=1e-5, equal_nan=True) for x, y in zip(got, want, strict=True))


def test_what_is_kept_per_page_is_declared(name, tmp_path):
    """`summarises` says what `open` does, before there is a store; and summaries can be made for pages that move, or rules refuse that."""
    driver = recording(name, tmp_path)
    router = driver.cache.blueprint.router
    assert router.summarises == any(pool.columns for pool in driver.probe.all_pools)
    assert router.rebuilds, "no router of this package needs the rules for those that can't"


def test_bytes_are_reported(name, tmp_path):
    """Summaries are KV bytes, what is kept per request or shard is metadata."""
    driver, plain = recording(name, tmp_path, num_shards=4), recording("all", tmp_path, num_shards=4, placed=name)
    for each in (driver, plain):
        each.prefill([70])
        each.decode()
    own, dense = (stats(each.cache, 1, 71) for each in (driver, plain))
    summaries = sum(pool.column(column).nbytes for pool in driver.probe.all_pools for column in pool.columns)
    assert own["kv_bytes_allocated"] == dense["kv_bytes_allocated"] + summaries
    router = driver.probe.router
    if router is None:
        assert own["metadata_bytes"] == dense["metadata_bytes"]
        return
    assert not held_bytes(router, without=[driver.probe.rows, *router.from_files]), "it keeps what it has not declared"
    assert own["metadata_bytes"] == dense["metadata_bytes"] + driver.probe.rows.nbytes + COUNTERS
    check_bytes(driver.cache)


def test_pinned_pages_are_always_read(name, tmp_path):
    """Sinks and the recent window, whatever the scores; a router that reads less than everything reads less than is stored."""
    driver = recording(name, tmp_path, num_shards=4)
    driver.prefill([70])
    if driver.probe.router is None:
        assert ROUTERS.get(name).reads_all
        return
    seen = []

    def checking(asked, page_list):
        listed = torch.zeros(*page_list.shape[:2], asked.block_table.shape[-1] + 1, dtype=torch.bool)
        listed.scatter_(2, torch.where(page_list >= 0, page_list, listed.shape[-1] - 1).long(), True)
        must = (asked.pinned & asked.visible).flatten(0, 1).unsqueeze(1)
        assert bool((listed[..., :-1] | ~must).all())
        assert bool((asked.visible.flatten(0, 1).unsqueeze(1) | ~listed[..., :-1]).all()), "a page beyond what is visible"
        seen.append(int(must.sum()))

    driver.probe.on_choice(checking)
    for _ in range(4):
        driver.decode()
    assert min(seen) >= 2
    assert 0 < driver.probe.read_share < 1

"""Blocks inside of pages (`routing.block_size`), against the oracle that lists and sorts them, and against reading everything. One rank."""

import pytest
import torch

from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.errors import ConfigError
from tests.harness.driver import Driver, layer, ragged
from tests.harness.selecting import selecting

CASES = [({"pages": 5}, 1, "int8"), ({"pages": 6, "spread": 1.0, "heads": "max"}, 4, "fp32"), ({"ratio": 0.3}, 1, "bf16"),
         ({"ratio": 0.3, "recent": 0}, 2, "int8"), ({"ratio": 1.0}, 1, "int8")]  # fmt: skip


@pytest.mark.parametrize(("options", "num_shards", "metadata"), CASES, ids=str)
def test_blocks_are_those_of_the_oracle(options, num_shards, metadata):
    driver, selected = selecting(num_shards=num_shards, metadata=metadata, page_size=16, block_size=4, **options)
    driver.prefill([50, 17])
    driver.forward(ragged([7, 7]))
    for _ in range(6):
        driver.decode()
    driver.select([1, 0, 0])
    driver.forward(ragged([40, 33, 21]))  # more queries than are answered at once, twice the window
    driver.decode()
    assert selected.left_out > 0 or options.get("ratio") == 1.0


@pytest.mark.parametrize("codec", ["int8", "fp8_e4m3"])
def test_blocks_of_coded_pages(codec):
    """Keys are 0 or the largest: decoded without loss. An open group is read raw, and only the blocks of it that are chosen."""
    driver, selected = selecting([layer(0, dim=32)], pages=9, page_size=64, block_size=8, codec=codec, num_shards=2, recent=3)
    driver.prefill([220, 190])
    driver.forward(ragged([3, 3]))
    for _ in range(3):
        driver.decode()
    assert selected.left_out > 0


@pytest.mark.parametrize("codec", ["none", "int8", "int4"])
def test_all_blocks_are_the_whole_cache(codec):
    """A budget that holds every block gives what reading all pages gives."""
    outs = []
    for routing in ({"method": "all"}, {"method": "bounds", "budget_ratio": 1.0, "block_size": 8, "metadata": "int8"}):
        driver = Driver([layer(0, dim=64)], routing=routing, codec=codec, page_size=64)
        driver.prefill([150, 64])
        outs.append([x for _ in range(3) for x in driver.forward(torch.ones(2, 1, dtype=torch.bool))[0]])
    for every, chosen in zip(*outs, strict=True):
        torch.testing.assert_close(chosen, every, rtol=1e-4, atol=1e-4)


def test_a_policy_sees_pages():
    """What a policy counts of a page is what the query found in its blocks: with all blocks read the same pages stay."""
    outs, scheduling = [], {"method": "h2o", "budget_tokens": 64, "sink_tokens": 4, "recent_tokens": 8, "interval": 1}
    for routing in ({"method": "all"}, {"method": "bounds", "budget_ratio": 1.0, "block_size": 4, "metadata": "int8"}):
        driver = Driver([layer(0)], routing=routing, scheduling=scheduling, page_size=16, checks=[])
        driver.prefill([150, 90])
        outs.append([x for _ in range(20) for x in driver.forward(torch.ones(2, 1, dtype=torch.bool))[0]])
        assert driver.probe.near_pool(0).num_pages <= 14, "nothing was evicted"
    for every, chosen in zip(*outs, strict=True):
        torch.testing.assert_close(chosen, every, rtol=1e-4, atol=1e-5)


def refused(**routing):
    page_size, codec = routing.pop("page_size", 64), routing.pop("codec", "int4")
    with pytest.raises(ConfigError) as caught:
        PiKVConfig(page_size=page_size, compression={"method": codec}, routing={"budget_ratio": 0.1} | routing)
    return caught.value


def test_what_does_not_combine_is_refused_by_name():
    assert refused(method="centroids", block_size=8).rule == "blocks-need-a-router"
    assert refused(method="bounds", block_size=12).rule == "blocks-divide-pages"
    assert "blocks of 8 tokens" in str(refused(method="bounds", block_size=8, budget_ratio=None, budget_pages=2))
    PiKVConfig(page_size=64, compression={"method": "int4"}, routing={"method": "bounds", "budget_ratio": 0.1, "block_size": 8})

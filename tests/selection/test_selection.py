"""Which pages queries read, against a slow oracle that lists the pages of every query and sorts them. One rank."""

import pytest
import torch

from tests.harness.driver import Driver, layer, ragged
from tests.harness.selecting import LAYERS, PAGE, selecting

QUEST = {"spread": 1.0, "heads": "max"}
CASES = [({"pages": 3} | QUEST, 1), ({"pages": 6} | QUEST, 4), ({"ratio": 0.3} | QUEST, 4), ({"ratio": 1.0} | QUEST, 1),
         ({"pages": 3}, 4), ({"ratio": 0.3}, 1), ({"pages": 6, "heads": "max"}, 4), ({"pages": 6, "spread": 0.0}, 1)]  # fmt: skip


@pytest.mark.parametrize(("options", "num_shards"), CASES, ids=str)
def test_pages_are_those_of_the_oracle(options, num_shards):
    driver, selected = selecting(num_shards=num_shards, **options)
    driver.prefill([30, 17])
    driver.forward(ragged([7, 7]))
    driver.forward(ragged([5, 2]))
    for _ in range(10):
        driver.decode()
    driver.forward(ragged([40, 33]))  # more queries than are answered at once, twice the window
    driver.decode()
    assert selected.left_out > 0 or options.get("ratio") == 1.0


@pytest.mark.parametrize("metadata", ["fp32", "int8"])
def test_rows_that_fork_take_their_bounds_along(metadata):
    driver, selected = selecting(pages=4, num_shards=2, metadata=metadata)
    driver.prefill([30, 22])
    for index in ([1, 0], [0, 0, 1], [2, 1]):
        driver.select(index)
        for _ in range(3):
            driver.decode()


@pytest.mark.parametrize("metadata", ["fp32", "int8"])
def test_entries_that_wait_for_their_expert(metadata):
    """Staged: a query does not see its own entry in the store, and neither may the bounds."""
    driver, selected = selecting([layer(0), layer(1)], pages=4, expert_ids="true", num_shards=2, metadata=metadata)
    driver.prefill([20, 11])
    driver.forward(ragged([7, 7]))
    for _ in range(6):
        driver.decode()


def test_latent_layers():
    driver, selected = selecting([layer(0, dim=16, latent=True)], pages=4, num_shards=2)
    driver.prefill([40, 22])
    driver.forward(ragged([5, 5]))
    for _ in range(4):
        driver.decode()
    assert selected.left_out > 0


@pytest.mark.parametrize("codec", ["int8", "fp8_e4m3"])
def test_compressed_pages(codec):
    """Keys are 0 or the largest: decoded without loss, and pages that tie are taken in their order."""
    driver, selected = selecting([layer(0, dim=32)], pages=2, page_size=64, codec=codec, num_shards=2, recent=3)
    driver.prefill([420, 390])
    driver.forward(ragged([3, 3]))
    for _ in range(3):
        driver.decode()
    assert selected.left_out > 0


@pytest.mark.parametrize("metadata", ["fp32", "bf16", "fp16", "int8"])
def test_pages_that_are_not_read_may_hold_anything(metadata):
    """NaN in their keys and values changes no bit of any output."""
    runs = []
    for poisoned in (False, True):
        driver, selected = selecting([layer(0)], pages=5, num_shards=2, metadata=metadata)
        driver.prefill([60, 41])
        pool = driver.probe.near_pool(0)

        def poisoning(asked, page_list, pool=pool):
            """page_list [N, H, K]"""
            read = torch.zeros(pool.num_pages, pool.fmt.num_kv_heads, dtype=torch.bool)
            for table, head, k in (page_list >= 0).nonzero().tolist():
                read[asked.block_table[table, 0, page_list[table, head, k]], head] = True
            k, v, _ = pool.fields
            k[~read], v[~read] = torch.nan, torch.nan

        if poisoned:
            driver.probe.on_choice(poisoning)
        runs.append(driver.forward(torch.ones(2, 1, dtype=torch.bool)))
        if poisoned:
            assert int(pool.fields[0].isnan().any(-1).any(-1).sum()) > 20
    for (out, lse), (other_out, other_lse) in zip(*runs, strict=True):
        assert torch.equal(out, other_out) and torch.equal(lse, other_lse)


def test_entries_read_are_counted():
    driver, selected = selecting([layer(0)], pages=6, num_shards=2)
    driver.prefill([100])
    driver.decode()
    read = driver.probe.read
    assert read.visible == 101
    assert 5 * PAGE < read.entries <= 6 * PAGE


@pytest.mark.parametrize("method", ["bounds", "shuffle"])
def test_bytes_of_int8_bounds(method):
    """2 * k_dim codes and two bf16 scales per page, layer and kv head; and rows grow, fork, crop and start anew with them."""
    routing = {"method": method, "metadata": "int8", "budget_pages": 4, "sink_tokens": 2, "recent_tokens": 5}
    driver = Driver(LAYERS, routing=routing, page_size=PAGE, num_shards=4, checks=[])
    driver.prefill([40, 23])
    driver.select([1, 1, 0])
    driver.decode()
    driver.announce_crops()
    driver.forward(ragged([4, 4, 4]))
    driver.crop([n - 3 for n in driver.lens])
    for _ in range(3):
        for out, lse in driver.forward(torch.ones(3, 1, dtype=torch.bool)):
            assert bool(out.isfinite().all()) and bool(lse.isfinite().all())
    for pool in driver.probe.all_pools:
        assert pool.column("bounds").nbytes == pool.num_pages * pool.fmt.num_kv_heads * (2 * pool.fmt.k_dim + 4)

"""Budgets per KV head: every head keeps its own entries, attention is that of each head over what it kept, memory follows."""

import pytest
import torch

from pikv_ds.cache.stats import stats
from pikv_ds.errors import ConfigError
from tests.harness.driver import Driver, layer, ragged
from tests.harness.heads import HEADS, HeadAttention, HeadPages, Twins, held_by
from tests.harness.invariants import poison

pytestmark = pytest.mark.usefixtures("nan_filled_empty")
SMALL = {"sink_tokens": 2, "recent_tokens": 3}
BUDGET = 22


def driver(head_budget: str, method: str = "h2o", page_size: int = 2, num_shards: int = 1, attention=True, **scheduling) -> Driver:
    scheduling = {"method": method, "budget_tokens": BUDGET, "head_budget": head_budget, **SMALL, **scheduling}
    checks = [HeadPages(), *[HeadAttention()] * attention]
    return Driver([layer(0), layer(1)], page_size=page_size, num_shards=num_shards, scheduling=scheduling, checks=checks)


@pytest.mark.parametrize("method", ["h2o", "knorm", "quest"])
@pytest.mark.parametrize("page_size", [1, 3], ids="page{}".format)
@pytest.mark.parametrize("head_budget", ["uniform", "adaptive"])
@pytest.mark.parametrize("num_shards", [1, 4], ids="S{}".format)
def test_each_head_attends_to_what_it_kept(num_shards, head_budget, page_size, method):
    d = driver(head_budget, method, page_size, num_shards)
    d.prefill([40, 1, 25])
    for mask in [*[ragged([1, 1, 1])] * 5, ragged([4, 0, 9]), ragged([1, 0, 1]), ragged([11, 30, 2], left=False), *[ragged([1, 1, 1])] * 5]:
        poison(d)
        d.forward(mask)
        for i in range(2):
            counts = d.probe.near_pool(i).counts.unflatten(1, (-1, HEADS)).sum(1)
            assert (counts.sum(1) <= HEADS * BUDGET).all() and (head_budget == "adaptive" or counts.max() <= BUDGET)
            floor = torch.tensor([min(n, 4) for n in d.lens]).unsqueeze(1)
            assert (counts >= floor - page_size).all()
    sets = {tuple(held_by(d, 0, 0, head)) for head in range(HEADS)}
    assert len(sets) == HEADS, "both heads kept the same entries"


@pytest.mark.parametrize("num_shards", [1, 2], ids="S{}".format)
def test_adaptive_budgets_differ_between_heads_down_to_a_floor(num_shards):
    for floor in (0.1, 1.0):
        d = driver("adaptive", "knorm", 1, num_shards, head_floor=floor)
        d.prefill([60, 50])
        counts = torch.stack([pool.counts.unflatten(1, (-1, HEADS)).sum(1) for pool in d.probe.all_pools])
        assert (counts.sum(-1) == HEADS * BUDGET).all() and bool((counts != BUDGET).any()) == (floor < 1)


@pytest.mark.parametrize("method", ["h2o", "tova", "quest", "snapkv"])
@pytest.mark.parametrize("num_shards", [1, 4], ids="S{}".format)
def test_a_head_keeps_what_a_cache_of_its_own_would(num_shards, method):
    scheduling = {"method": method, "budget_tokens": 30, "head_budget": "uniform", **SMALL}
    options = {"page_size": 3, "num_shards": num_shards, "capacity_tokens": 400, "scheduling": scheduling}
    d = Driver([layer(0), layer(1)], checks=[HeadAttention(), HeadPages(), Twins()], **options)
    d.prefill([60, 17])
    for mask in [*[ragged([1, 1])] * 4, ragged([5, 11]), ragged([9, 0]), *[ragged([1, 1])] * 6]:
        d.forward(mask)


@pytest.mark.parametrize("num_shards", [1, 4], ids="S{}".format)
def test_forks_of_heads(num_shards):
    d = driver("adaptive", page_size=3, num_shards=num_shards)
    d.prefill([40, 17])
    for parents in ([0, 1], [1, 0, 0], [2, 1]):
        d.select(parents)
        d.decode()
        poison(d)
        d.decode()


@pytest.mark.parametrize("num_shards", [1, 2], ids="S{}".format)
def test_announced_crops_of_heads(num_shards):
    # What waits with its eviction goes at the beginning of the next forward: no attention over what was held before it.
    d = driver("uniform", "knorm", 3, num_shards, attention=False)
    d.prefill([40, 17])
    d.announce_crops()
    for taken_back in (3, 0, 4):
        d.forward(ragged([5, 5]))
        poison(d)
        d.crop([n - taken_back for n in d.lens])
    d.end_crops()
    d.decode()
    assert stats(d.cache, 1, 1)["entries_cropped"] == 2 * 2 * HEADS * 7


@pytest.mark.parametrize("num_shards", [1, 2], ids="S{}".format)
def test_memory_of_heads_follows_the_budget(num_shards):
    # What is evicted before a forward was held after the last one: no attention over that.
    d = driver("uniform", "knorm", 4, num_shards, attention=False, prefill="keep")
    d.prefill([200])
    record = d.probe.formats[0].record_bytes
    assert d.probe.near_pool(0).nbytes >= HEADS * 50 * record
    d.decode()
    assert d.probe.near_pool(0).nbytes <= 1.25 * HEADS * (BUDGET // 4 + num_shards) * record + record


def test_a_budget_in_bytes_is_that_of_all_heads():
    d = driver("uniform", "knorm", 1)
    record = d.probe.formats[0].record_bytes
    d = driver("uniform", "knorm", 1, budget_tokens=None, budget_bytes=2 * HEADS * 30 * record)  # two layers
    d.prefill([60])
    assert [pool.counts.tolist() for pool in d.probe.all_pools] == [[[30, 30]]] * 2


REFUSED = {
    "MLA": (layer(1, latent=True), {}, "latent"),
    "window": (layer(1, window=5), {}, "sliding window of 5"),
    "heads": (layer(1, num_kv_heads=4), {}, "4 KV heads"),
    "router": (layer(1), {"routing": {"method": "bounds", "budget_ratio": 0.5}}, "routing.method = 'bounds'"),
}


@pytest.mark.parametrize(("second", "options", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_refusals(second, options, said):
    scheduling = {"method": "streaming_llm", "budget_tokens": 50, "head_budget": "uniform", **SMALL}
    with pytest.raises(ConfigError, match=f"head_budget = 'uniform'.*{said}"):
        Driver([layer(0), second], page_size=2, scheduling=scheduling, **options)

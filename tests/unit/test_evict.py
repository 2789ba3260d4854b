"""Eviction on one rank against an oracle in loops: kept sets, attention over them, pages and bytes after every forward."""

import os
from pathlib import Path

import pytest
import torch

from pikv_ds.cache import PiKVCache
from pikv_ds.config import PiKVConfig
from pikv_ds.errors import ConfigError
from pikv_ds.plan import LocalStep
from pikv_ds.spec import LayerSpec
from pikv_ds.stats import stats
from tests.unit.driver import Driver, layer, ragged
from tests.unit.evicting import (
    EvictingDriver,
    accumulated,
    bound,
    features,
    last_and_frequent_use,
    last_position,
    last_query,
    last_use,
    observed,
    short_keys,
)
from tests.unit.invariants import poison

pytestmark = pytest.mark.usefixtures("nan_filled_empty")

KINDS = [layer(0), layer(1, window=6), layer(2, latent=True)]
ORACLES = {
    "streaming_llm": (last_position, {}),
    "h2o": (accumulated, {}),
    "tova": (last_query, {}),
    "lru": (last_use, {}),
    "lru_plus": (last_and_frequent_use, {}),
    "adakv": (features, {"rate": 0.0}),
    "snapkv": (observed, {"window": 3}),
    "quest": (bound, {}),
    "knorm": (short_keys, {}),
}
SMALL = {"sink_tokens": 2, "recent_tokens": 3}


def run_mix(driver: Driver) -> None:
    """Ragged prefill beyond the budget, decode, chunks with padding on either side, idle rows; freed slots are poisoned throughout."""
    driver.prefill([40, 1, 25])
    for mask in [*[ragged([1, 1, 1])] * 9, ragged([4, 0, 9]), ragged([1, 0, 1]), ragged([11, 30, 2], left=False), *[ragged([1, 1, 1])] * 9]:
        poison(driver)
        driver.forward(mask)


@pytest.mark.parametrize("method", ORACLES)
@pytest.mark.parametrize("page_size", [1, 3], ids="page{}".format)
@pytest.mark.parametrize("num_shards", [1, 4], ids="S{}".format)
def test_kept_sets_and_attention(num_shards, page_size, method):
    score, options = ORACLES[method]
    scheduling = {"method": method, "budget_tokens": 24 if num_shards == 1 else 29, **SMALL, **options}
    driver = EvictingDriver(KINDS, score, scheduling, page_size=page_size, num_shards=num_shards)
    run_mix(driver)
    assert driver.evicted > 100


def test_one_request_alone_fed_in_chunks():
    """Its only table is shown to every query of a chunk: the ops take no table that repeats by stride."""
    driver = EvictingDriver([layer(0)], accumulated, {"method": "h2o", "budget_tokens": 12, **SMALL}, page_size=3)
    driver.prefill([20])
    for columns in (9, 1, 5):
        driver.forward(ragged([columns]))
    assert driver.evicted >= 15


@pytest.mark.parametrize("expert_ids", ["true", "hash"])
def test_positions_only_needs_no_experts_in_time(expert_ids):
    scheduling = {"method": "streaming_llm", "budget_tokens": 24, **SMALL}
    run_mix(EvictingDriver(KINDS, last_position, scheduling, page_size=2, num_shards=2, expert_ids=expert_ids))


def test_interval_lets_the_budget_be_exceeded_in_between():
    driver = EvictingDriver(
        [layer(0)], last_position, {"method": "streaming_llm", "budget_tokens": 12, "interval": 5, **SMALL}, page_size=1
    )
    driver.prefill([12])
    sizes = []
    for _ in range(11):
        driver.decode()
        sizes.append(int(driver.cache.tables.counts.sum()))
    assert sizes == [13, 14, 15, 16, 12, 13, 14, 15, 16, 12, 13]


def test_a_prompt_that_is_kept_whole_is_evicted_before_the_first_decode_step():
    options = {"method": "streaming_llm", "budget_tokens": 12, "prefill": "keep", **SMALL}
    driver = EvictingDriver([layer(0)], last_position, options, page_size=4)
    driver.prefill([30])
    driver.forward(ragged([7]))
    assert int(driver.cache.tables.counts.sum()) == 37
    driver.decode()
    assert int(driver.cache.tables.counts.sum()) <= 12
    driver.decode()


@pytest.mark.parametrize("num_shards", [1, 4], ids="S{}".format)
def test_forks_keep_what_their_parents_kept(num_shards):
    driver = EvictingDriver(
        KINDS, last_position, {"method": "streaming_llm", "budget_tokens": 24, **SMALL}, page_size=3, num_shards=num_shards
    )
    driver.prefill([40, 17])
    for parents in ([0, 1], [1, 0, 0], [2, 1], [0, 0, 1, 1]):
        driver.select(parents)
        driver.decode()
        poison(driver)
        driver.decode()


@pytest.mark.parametrize("num_shards", [1, 4], ids="S{}".format)
def test_crops_that_were_announced_wait_with_eviction(num_shards):
    """As in assisted decoding: several columns, some taken back; what is evicted goes once the crop has happened."""
    options = {"method": "streaming_llm", "budget_tokens": 24, **SMALL}
    driver = EvictingDriver(KINDS, last_position, options, page_size=3, num_shards=num_shards)
    driver.prefill([40, 17])
    driver.announce_crops()
    for taken_back in (3, 0, 4):
        driver.forward(ragged([5, 5]))
        poison(driver)
        driver.crop([n - taken_back for n in driver.lens])
    driver.cache.hold_margin = None
    driver.decode()
    assert driver.evicted > 20


def test_a_crop_behind_an_eviction_is_refused():
    driver = EvictingDriver([layer(0)], last_position, {"method": "streaming_llm", "budget_tokens": 12, **SMALL}, page_size=4)
    driver.prefill([30])
    driver.crop([29])
    with pytest.raises(RuntimeError, match="crop to 29 of 30 tokens: entries were evicted .* at 30 tokens"):
        driver.decode()


def test_memory_follows_the_budget_within_one_step():
    """Slabs are returned: what 400 tokens leave allocated is what 32 entries take, by the 1.25 x + one slab rule of the store."""
    driver = Driver([layer(0)], page_size=4, scheduling={"method": "streaming_llm", "budget_tokens": 32, "prefill": "keep", **SMALL})
    driver._compare = lambda *_: None
    driver.prefill([400])
    full = stats(driver.cache, 1, 1)
    driver.decode()
    left = stats(driver.cache, 1, 1)
    record = driver.cache.tables.stores[0].fmt.record_bytes
    assert full["kv_bytes_allocated"] == 100 * record and left["kv_bytes_allocated"] <= 10 * record
    assert left["entries_evicted"] == 401 - left["entries_live"] and left["entries_live"] <= 33


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("granularity", "head_budget", "num_shards"), [("page", "shared", 1), ("page", "uniform", 2), ("token", "shared", 2)]
)
def test_the_process_gets_smaller(granularity, head_budget, num_shards):
    """A prompt of 24,576 tokens in two layers, 96 MiB of pages; 1/8 stays."""
    spec = [LayerSpec(layer_idx=i, num_kv_heads=4, k_dim=64, v_dim=64) for i in range(2)]
    scheduling = {"method": "streaming_llm", "budget_ratio": 0.125, "prefill": "keep", "granularity": granularity}
    config = PiKVConfig(page_size=16, scheduling=scheduling | {"head_budget": head_budget}, storage={"num_shards": num_shards})
    cache = PiKVCache(spec, config, num_experts=1, dtype=torch.float32, device=torch.device("cpu"))

    def forward(before: int, columns: int) -> None:
        positions = torch.arange(before, before + columns, dtype=torch.int32).unsqueeze(0)
        row = {"num_new": [columns], "parent": [0 if before else -1], "keep": [before], "identity": before > 0, "fresh": before == 0}
        cache.begin_step(LocalStep(num_rows=1, num_columns=columns, positions=positions, digest=0, **row))
        for i in range(2):
            q, k, v = (torch.zeros(1, columns, 4, 64) for _ in range(3))
            cache.attend(i, q, k, v, scale=1.0, v_dim=64, expert_ids=None)
        cache.end_step()

    forward(0, 24_576)
    full, resident = stats(cache, 1, 1)["kv_bytes_allocated"], resident_bytes()
    forward(24_576, 1)
    freed = full - stats(cache, 1, 1)["kv_bytes_allocated"]
    print(f"allocated {full:,} -> {full - freed:,} bytes, resident {resident:,} -> {resident_bytes():,}")
    assert freed >= 0.85 * full and resident - resident_bytes() >= 0.9 * freed


REFUSED = {
    "pages of pins": (
        {"method": "lru", "budget_tokens": 10, "sink_tokens": 2, "recent_tokens": 3},
        {"page_size": 4},
        ["pikv.scheduling.budget_tokens = 10", ">= 11", "page_size 4", "1 shards"],
    ),
    "pages of pins in shards": (
        {"method": "streaming_llm", "budget_tokens": 22, "sink_tokens": 2, "recent_tokens": 3},
        {"page_size": 4, "num_shards": 4},
        ["legal is >= 23", "4 shards"],
    ),
    "bytes": ({"method": "lru", "budget_bytes": 1000}, {"page_size": 4}, ["pikv.scheduling.budget_bytes = 1000", "legal is >="]),
    "pins, to the entry": (
        {"method": "lru", "budget_tokens": 4, "sink_tokens": 2, "recent_tokens": 3, "granularity": "token"},
        {"page_size": 4},
        ["pikv.scheduling.budget_tokens = 4", ">= 5"],
    ),
    "entries of two pools": (
        {"method": "knorm", "budget_tokens": 99, "granularity": "token"},
        {"page_size": 64, "compression": {"method": "int8", "raw_recent_tokens": 64}},
        ["granularity = 'token'", "raw_recent_tokens", "'page'"],
    ),
    "entries that a router may not read": (
        {"method": "h2o", "budget_tokens": 99, "granularity": "token"},
        {"page_size": 4, "routing": {"method": "bounds", "budget_ratio": 0.5}},
        ["granularity = 'token'", "'h2o'", "routing.method = 'bounds'"],
    ),
    "staged entries": (
        {"method": "h2o", "budget_tokens": 99},
        {"expert_ids": "true", "page_size": 4},
        ["expert_ids = 'true'", "'h2o'", "'previous_layer'"],
    ),
}


@pytest.mark.parametrize(("scheduling", "options", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_refusals(scheduling, options, said):
    with pytest.raises(ConfigError) as caught:
        Driver([layer(0)], scheduling=scheduling, **options)
    for text in said:
        assert text in str(caught.value)


def test_a_model_of_windows_only_is_refused():
    with pytest.raises(ConfigError, match="all have a sliding window"):
        Driver([layer(0, window=4)], page_size=4, scheduling={"method": "streaming_llm", "budget_tokens": 99})

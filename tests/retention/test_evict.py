"""Eviction on one rank against an oracle in loops: kept sets, attention over them, pages and bytes after every forward."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pikv_ds.cache.stats import stats
from pikv_ds.errors import ConfigError
from tests.harness.driver import Driver, layer, ragged
from tests.harness.evicting import (
    accumulated,
    bound,
    evicting,
    features,
    last_and_frequent_use,
    last_position,
    last_query,
    last_use,
    observed,
    short_keys,
)
from tests.harness.invariants import poison

ROOT = Path(__file__).resolve().parents[2]
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
    driver, kept = evicting(KINDS, score, scheduling, page_size=page_size, num_shards=num_shards)
    run_mix(driver)
    assert kept.evicted > 100


def test_one_request_alone_fed_in_chunks():
    """Its only table is shown to every query of a chunk: the ops take no table that repeats by stride."""
    driver, kept = evicting([layer(0)], accumulated, {"method": "h2o", "budget_tokens": 12, **SMALL}, page_size=3)
    driver.prefill([20])
    for columns in (9, 1, 5):
        driver.forward(ragged([columns]))
    assert kept.evicted >= 15


@pytest.mark.parametrize("expert_ids", ["true", "hash"])
def test_positions_only_needs_no_experts_in_time(expert_ids):
    scheduling = {"method": "streaming_llm", "budget_tokens": 24, **SMALL}
    run_mix(evicting(KINDS, last_position, scheduling, page_size=2, num_shards=2, expert_ids=expert_ids)[0])


def test_interval_lets_the_budget_be_exceeded_in_between():
    driver, kept = evicting(
        [layer(0)], last_position, {"method": "streaming_llm", "budget_tokens": 12, "interval": 5, **SMALL}, page_size=1
    )
    driver.prefill([12])
    sizes = []
    for _ in range(11):
        driver.decode()
        sizes.append(driver.probe.live)
    assert sizes == [13, 14, 15, 16, 12, 13, 14, 15, 16, 12, 13]


def test_a_prompt_that_is_kept_whole_is_evicted_before_the_first_decode_step():
    options = {"method": "streaming_llm", "budget_tokens": 12, "prefill": "keep", **SMALL}
    driver, kept = evicting([layer(0)], last_position, options, page_size=4)
    driver.prefill([30])
    driver.forward(ragged([7]))
    assert driver.probe.live == 37
    driver.decode()
    assert driver.probe.live <= 12
    driver.decode()


@pytest.mark.parametrize("num_shards", [1, 4], ids="S{}".format)
def test_forks_keep_what_their_parents_kept(num_shards):
    driver, kept = evicting(
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
    driver, kept = evicting(KINDS, last_position, options, page_size=3, num_shards=num_shards)
    driver.prefill([40, 17])
    driver.announce_crops()
    for taken_back in (3, 0, 4):
        driver.forward(ragged([5, 5]))
        poison(driver)
        driver.crop([n - taken_back for n in driver.lens])
    driver.end_crops()
    driver.decode()
    assert kept.evicted > 20


@pytest.mark.parametrize("num_shards", [1, 4], ids="S{}".format)
def test_many_forwards_and_then_one_crop(num_shards):
    """A draft: nothing is evicted until it is known which of its tokens stay."""
    options = {"method": "streaming_llm", "budget_tokens": 24, **SMALL}
    driver, kept = evicting(KINDS, last_position, options, page_size=3, num_shards=num_shards)
    driver.prefill([40, 17])
    driver.announce_crops()
    for taken_back in (9, 0, 12):
        for _ in range(12):
            driver.decode()
            poison(driver)
        driver.crop([n - taken_back for n in driver.lens])
    driver.end_crops()
    driver.decode()
    assert kept.evicted > 20


def test_a_crop_behind_an_eviction_is_refused():
    driver, kept = evicting([layer(0)], last_position, {"method": "streaming_llm", "budget_tokens": 12, **SMALL}, page_size=4)
    driver.prefill([30])
    driver.crop([29])
    with pytest.raises(RuntimeError, match="crop to 29 of 30 tokens: entries were evicted .* at 30 tokens"):
        driver.decode()


def test_memory_follows_the_budget_within_one_step():
    """Slabs are returned: what 400 tokens leave allocated is what 32 entries take, by the 1.25 x + one slab rule of the store."""
    driver = Driver([layer(0)], page_size=4, scheduling={"method": "streaming_llm", "budget_tokens": 32, "prefill": "keep", **SMALL})
    driver.checks.clear()
    driver.prefill([400])
    full = stats(driver.cache, 1, 1)
    driver.decode()
    left = stats(driver.cache, 1, 1)
    record = driver.probe.formats[0].record_bytes
    assert full["kv_bytes_allocated"] == 100 * record and left["kv_bytes_allocated"] <= 10 * record
    assert left["entries_evicted"] == 401 - left["entries_live"] and left["entries_live"] <= 33


@pytest.mark.parametrize(("codec", "page_size", "num_shards"), [("fp8_e4m3", 8, 2), ("int8", 64, 1), ("int4", 64, 1)])
@pytest.mark.parametrize("method", ["streaming_llm", "h2o"])
def test_compressed_pages(method, codec, page_size, num_shards):
    """Entries of 0 and full scale lose nothing to a format: attention finds each where it should be, also in groups that were left open."""
    scheduling = {"method": method, "budget_tokens": 132, **SMALL}
    driver, kept = evicting([layer(0)], ORACLES[method][0], scheduling, page_size=page_size, num_shards=num_shards, codec=codec)
    driver.prefill([250, 70])
    for mask in [*[ragged([1, 1])] * 3, ragged([70, 5]), *[ragged([1, 1])] * 3]:
        driver.forward(mask)
    assert kept.evicted > 140


@pytest.mark.parametrize("head_budget", ["shared", "adaptive"])
def test_poisoned_slots_change_no_bit(head_budget):
    """Freed pages hold NaN in one of two runs."""
    outputs = []
    for poisoned in (False, True):
        scheduling = {"method": "h2o", "budget_tokens": 30, "head_budget": head_budget, **SMALL}
        driver = Driver([layer(0), layer(1)], page_size=4, num_shards=2, scheduling=scheduling)
        driver.checks.clear()
        driver.prefill([40, 25])
        outputs.append([])
        for mask in [*[ragged([1, 1])] * 3, ragged([9, 4]), *[ragged([1, 1])] * 3]:
            if poisoned:
                poison(driver)
            outputs[-1] += [x for pair in driver.forward(mask) for x in pair]
        assert stats(driver.cache, 1, 1)["entries_evicted"] > 60
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True)) and outputs[0][-1].isfinite().all()


@pytest.mark.parametrize(("head_budget", "num_shards"), [("shared", 1), ("uniform", 2)])
def test_the_process_gets_smaller(head_budget, num_shards):
    """A prompt of 24,576 tokens in two layers, 96 MiB of pages; 1/8 stays."""
    command = [sys.executable, "-m", "tests.harness.shrinking", head_budget, str(num_shards)]
    # Setting glibc's threshold keeps it where it starts: the temporaries of a forward then never stay in the process as free heap.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    full, left = json.loads(done.stdout).values()
    freed, given_back = full["allocated"] - left["allocated"], full["resident"] - left["resident"]
    print(f"allocated {full['allocated']:,} -> {left['allocated']:,} bytes, resident {full['resident']:,} -> {left['resident']:,}")
    assert freed >= 0.85 * full["allocated"] and given_back >= 0.9 * freed


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
    "pins of pages of one": (
        {"method": "lru", "budget_tokens": 4, "sink_tokens": 2, "recent_tokens": 3},
        {"page_size": 1},
        ["pikv.scheduling.budget_tokens = 4", ">= 5"],
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

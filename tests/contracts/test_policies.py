"""What every registered retention policy keeps."""

import inspect
import math

import pytest
import torch

from pikv_ds.errors import ConfigError
from pikv_ds.policies import POLICIES
from pikv_ds.policies.base import Pages, RetentionPolicy
from tests.harness.checks import Dense
from tests.harness.dense import rel_error
from tests.harness.driver import Driver, layer, ragged
from tests.harness.evicting import evicting
from tests.harness.invariants import poison
from tests.harness.pools import fill, make_pool
from tests.held import check_bytes
from tests.retention_blocks import needed
from tests.unrotated import held, unrotated

EVICTING = [name for name, policy in POLICIES.items() if not policy.keeps_all]


def some_pages(lens: list[int]) -> Pages:
    pool = make_pool(len(lens), 2, 4)
    if any(lens):
        fill(pool, {(row, shard): list(range(shard, n, 2)) for row, n in enumerate(lens) for shard in range(2)})
    return Pages(pool=pool, table=pool.table.ids, counts=pool.table.counts, lens=torch.tensor(lens))


@pytest.mark.parametrize("name", POLICIES.names())
def test_it_says_what_it_does(name):
    cls = POLICIES.get(name)
    assert issubclass(cls, RetentionPolicy) and cls.name == name
    text = inspect.getdoc(cls)
    assert text and "score" in text and (cls.keeps_all or "Source" in text), "formula and source belong in the docstring"


def test_none_never_evicts():
    assert POLICIES.build("none").score(some_pages([5, 9])).eq(torch.inf).all()


@pytest.mark.parametrize(("num_shards", "page_size"), [(1, 4), (2, 4), (1, 1), (2, 1)])
@pytest.mark.parametrize("name", EVICTING)
def test_budget_pins_and_attention(name, num_shards, page_size, tmp_path):
    """Whatever a policy prefers: budgets hold, pins stay, attention is that over the kept entries, freed slots may hold NaN."""
    own = needed(name, tmp_path, layers=3, heads=2, width=16)
    scheduling = {"method": name, "budget_tokens": 30, "sink_tokens": 2, "recent_tokens": 5} | own
    kinds, options = [layer(0), layer(1, window=7), layer(2)], {"page_size": page_size, "num_shards": num_shards, "placement": "position"}
    if POLICIES.get(name).needs_one_shard and num_shards > 1:
        with pytest.raises(ConfigError, match="one shard on one rank"):
            evicting(kinds, None, scheduling, **options)
        return
    if POLICIES.get(name).needs_head_budget:  # its entries are those of a head: tests/retention/test_evict_heads.py holds it to the rest
        with pytest.raises(ConfigError, match="head_budget = 'shared'"):
            evicting(kinds, None, scheduling | {"head_budget": "shared"}, **options)
        return
    driver, kept = evicting(kinds, None, scheduling, **options)
    driver.prefill([50, 3, 21])
    if page_size == 1:  # then the budget is kept to the entry
        assert len(kept.kept(0, 0)) == 30 or driver.probe.policy.target_hit_rate is not None
    for mask in [*[ragged([1, 1, 1])] * 6, ragged([9, 0, 13]), ragged([1, 0, 1]), *[ragged([1, 1, 1])] * 5]:
        poison(driver)
        driver.forward(mask)
    assert kept.evicted > 60


@pytest.mark.parametrize("page_size", [2, 1])
@pytest.mark.parametrize("name", EVICTING)
def test_keys_before_their_rotation_are_no_other_choice(name, page_size, tmp_path):
    """Pages that hold coefficients of un-rotated keys, all of them: attention, keys and so the entries kept are those of raw pages."""
    kinds = [layer(0)]
    scheduling = {"method": name, "budget_tokens": 22, "sink_tokens": 2, "recent_tokens": 3}
    scheduling |= needed(name, tmp_path, layers=1, heads=2, width=16)
    shards = 1 if POLICIES.get(name).needs_one_shard else 2
    found = []
    for compression in ({}, unrotated(kinds, tmp_path)):
        driver = Driver(kinds, page_size=page_size, num_shards=shards, placement="position", scheduling=scheduling, compression=compression)
        driver.without(Dense)
        seen = []
        driver.prefill([40, 3])
        for mask in (ragged([1, 1]), ragged([9, 6]), *[ragged([1, 1])] * 2):
            poison(driver)
            outputs = driver.forward(mask)
            seen.append(held(driver))
        found.append((seen, outputs))
    (raw, outputs), (kept, others) = found
    assert kept == raw and len(raw[-1][0][0][0]) < 30
    for want, got in zip(outputs, others, strict=True):
        assert all(rel_error(x, y) < 1e-5 for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("name", [name for name in EVICTING if POLICIES.get(name).reads_positions_only])
def test_what_reads_positions_only_reads_nothing_else(name, tmp_path):
    """Records that hold other numbers give the same scores, and no attention is measured."""
    policy = POLICIES.build(name, **needed(name, tmp_path, layers=1, heads=2, width=16))
    assert not policy.watches and not policy.reads_model_queries
    pages = some_pages([9, 14])
    positions, score = pages.pool.positions.clone(), policy.score(pages)
    pages.pool.pages.fill_(0xFF)  # NaN keys and values
    pages.pool.positions.copy_(positions)
    again = policy.score(Pages(pool=pages.pool, table=pages.table, counts=pages.counts, lens=pages.lens))
    assert torch.equal(score, again) and pages.keys.isnan().any()


@pytest.mark.parametrize("name", POLICIES.names())
def test_bytes_are_reported(name, tmp_path):
    """What a policy keeps per page is KV bytes, what it keeps per row is metadata, and it keeps nothing else."""
    kinds, scheduling = [layer(0), layer(1)], {"method": name} | needed(name, tmp_path, layers=2, heads=2, width=16)
    if not POLICIES.get(name).keeps_all:
        scheduling |= {"budget_tokens": 22, "sink_tokens": 2, "recent_tokens": 3}
    driver = Driver(kinds, page_size=2, scheduling=scheduling)
    driver.checks.clear()
    driver.prefill([40, 3])
    for mask in (ragged([9, 6]), *[ragged([1, 1])] * 3):
        driver.forward(mask)
        check_bytes(driver.cache)
    policy = driver.probe.policy
    if policy is None:
        assert POLICIES.get(name).keeps_all
        return
    shapes = policy.row_values(driver.num_q_heads, kinds[0].k_dim).values()
    numbers = len(kinds) * len(driver.lens) * sum(math.prod(shape) for shape in shapes)
    assert driver.probe.watched_bytes == 4 * numbers, "f32 per layer and row"


@pytest.mark.parametrize("name", EVICTING)
def test_scores_are_comparable_numbers(name, tmp_path):
    """Through the cache, so that what a policy keeps per page and per row exists; absent pages must not be NaN either."""
    own = needed(name, tmp_path, layers=1, heads=2, width=16)
    scheduling = {"method": name, "budget_tokens": 40, "sink_tokens": 2, "recent_tokens": 5} | own
    driver = Driver([layer(0)], scheduling=scheduling, page_size=4)
    driver.prefill([33, 2])
    score, table = driver.probe.scores(0), driver.probe.judged(0).table
    assert score.shape == table.shape and score.dtype == torch.float32
    assert score[table >= 0].isfinite().all() and not score.isnan().any()

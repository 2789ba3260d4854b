"""Eviction over process groups: one launch per world runs all methods; kept sets do not depend on the number of ranks."""

import pytest

from pikv_ds.policies import POLICIES
from tests.dist.jobs.evict import HEAD_METHODS, ONE_METHODS, ROUTING, distinct_cases
from tests.dist.launcher import JobResult, run_gloo
from tests.long_form import short_or_long

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]
METHODS = [
    name
    for name, policy in POLICIES.items()
    if not (policy.keeps_all or policy.sums_layers or policy.needs_one_shard or policy.needs_head_budget)
]
HEADS = [f"{method} {head_budget} heads" for method in HEAD_METHODS for head_budget in ("uniform", "adaptive")]
CHECKS = [
    *HEADS,
    *(f"{method} ones" for method in ONE_METHODS),
    "beams",
    "assisted",
    "beams of heads",
    "quest svd",
    "quest svd heads",
    *(f"h2o with {router}" for router in ROUTING),
]
# Short, on 4 ranks: one policy for each thing that ranks must agree on. All of them are held to the same on 2.
OF_FOUR = [
    "streaming_llm",  # positions
    "lru",  # when an entry was last written or read
    "h2o",  # sums of attention, a collective of their own
    "adakv",  # a budget that heads share
    "quest",  # bounds of pages
    "knorm",  # keys
    "kvzip",  # a file
]
_jobs: dict[int, JobResult] = {}


def methods(world: int) -> list[str]:
    return METHODS if world < 4 else short_or_long(OF_FOUR, METHODS)


def job(world: int) -> JobResult:
    if world not in _jobs:
        _jobs[world] = run_gloo("evict.py", methods(world), ranks=world, timeout_s=280)
    return _jobs[world]


KEPT = [(check, world) for world in (1, 2, 4) for check in (*methods(world), *CHECKS)]
BY_RANK = [(check, world) for world in (2, 4) for check in ("distinct", "distinct, by head", "distinct, quest svd")]
BY_RANK += [(f"distinct, {method}, {how}", world) for world in (2, 4) for method, how in distinct_cases(world)]


@pytest.mark.parametrize(("check", "world"), KEPT, ids=[f"{check}-world{world}" for check, world in KEPT])
def test_kept_sets_depend_on_shards_not_on_ranks(check: str, world: int):
    rows, alone = job(world).check(check), job(1).check(check)[0]
    for row in rows:
        assert row["kept"] == alone["kept"] and row["tokens"] == alone["tokens"]


@pytest.mark.parametrize(("check", "world"), BY_RANK, ids=[f"{check}-world{world}" for check, world in BY_RANK])
def test_requests_that_differ_between_ranks(check: str, world: int):
    """Policies that look at attention keep of every request what they keep of it alone."""
    job(world).check(check)


@pytest.mark.parametrize("world", [2, 4], ids="world{}".format)
def test_attention_statistics_cost_one_collective_per_forward(world: int):
    for row in job(world).check("collectives of a step, by attention"):
        assert row["collectives"] == 2 * row["layers"] + 1


@pytest.mark.parametrize("world", [1, 2, 4], ids="world{}".format)
def test_one_more_collective_per_eviction(world: int):
    """The prompt of 70 tokens and 23 decode steps: every second token fills a page of one of the shards, sometimes later."""
    row = job(world).check("streaming_llm")[0]
    assert row["collectives"] == 0 if world == 1 else 8 <= row["collectives"] <= 24

"""Page selection over process groups: which pages are read depends on the shards, never on the ranks."""

import pytest

from pikv_ds.routers import ROUTERS
from tests.dist.jobs.selection import UNROTATED
from tests.dist.launcher import JobResult, run_gloo
from tests.long_form import short_or_long

pytestmark = [pytest.mark.dist, pytest.mark.timeout(240)]
NAMES = [name for name, router in ROUTERS.items() if not router.reads_all]
# Short, on 4 ranks: pages by bounds, by centroids, none chosen; shards by a table, by load, by what was missed, by a gate.
# All of them are held to the same on 2.
OF_FOUR = ["bounds", "centroids", "sinks_recent", "hash", "load_balanced", "cache_aware", "learned"]
WORLDS = pytest.mark.parametrize("world", [2, 4], ids="world{}".format, scope="module")
REQUESTS = pytest.mark.parametrize("requests", ["replicated", "distinct"])
_jobs: dict[int, JobResult] = {}


def names(world: int) -> list[str]:
    return NAMES if world < 4 else short_or_long(OF_FOUR, NAMES)


def job(world: int) -> JobResult:
    if world not in _jobs:
        _jobs[world] = run_gloo("selection.py", names(world), ranks=world, timeout_s=200)
    return _jobs[world]


CASES = [(name, world) for world in (2, 4) for name in names(world)]


@REQUESTS
@pytest.mark.parametrize(("name", "world"), CASES, ids=[f"{name}-world{world}" for name, world in CASES])
def test_the_same_pages_as_on_one_rank(name: str, requests: str, world: int):
    job(world).check(f"{name} {requests}")


@REQUESTS
@pytest.mark.parametrize("name", ["bounds", "centroids", "topk", "shuffle"])
def test_the_same_pages_as_on_one_rank_while_bases_change(name: str, requests: str):
    job(2).check(f"{name} {requests} svd")


@WORLDS
@REQUESTS
@pytest.mark.parametrize("name", UNROTATED)
def test_the_same_pages_of_keys_before_their_rotation(name: str, requests: str, world: int):
    """All directions are kept: the pages that one rank reads of raw keys."""
    job(world).check(f"{name} {requests} unrotated")


@WORLDS
@REQUESTS
def test_bytes_of_a_step_are_those_of_the_formula(requests: str, world: int):
    rows = job(world).check(f"bytes {requests}")
    print([(row["bytes"], row["choosing"], row["collectives"]) for row in rows])


@WORLDS
@pytest.mark.parametrize("by", ["pages", "shards"])
def test_bytes_on_the_wire_fall_with_the_budget(by: str, world: int):
    """Partials of 1, 3 and 40 pages per head, of 1, 2 and 4 of the 4 shards."""
    rows = job(world).check(f"needed, {by}")
    print([(row["returned"], row["whole"]) for row in rows])


@WORLDS
def test_ranks_that_diverge_stop_together(world: int):
    job(world).check("diverged")

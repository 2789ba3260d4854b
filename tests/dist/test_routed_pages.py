"""Pages chosen by the rank of the query over process groups: the bits of a choice of all ranks, the bytes of the formula."""

import pytest

from tests.dist.jobs.routed_pages import LIVES
from tests.dist.launcher import JobResult, run_gloo
from tests.long_form import short_or_long

pytestmark = [pytest.mark.dist, pytest.mark.timeout(240)]
# Short: what moves pages beside what codes them. Ranks of one request each have no rows to change.
OF_TWO = short_or_long(["windows", "int4 in blocks", "evicting", "changing"], [*LIVES, "changing"])
OF_FOUR = short_or_long(["plain"], [*LIVES, "changing"])
_jobs: dict[int, JobResult] = {}


def job(world: int) -> JobResult:
    if world not in _jobs:
        names = [*OF_TWO, "bytes", "fixed"] if world == 2 else [*OF_FOUR, "bytes", "share"]
        _jobs[world] = run_gloo("routed_pages.py", names, ranks=world, timeout_s=200)
    return _jobs[world]


@pytest.mark.parametrize(("name", "world"), [*((name, 2) for name in OF_TWO), *((name, 4) for name in OF_FOUR)])
def test_the_bits_of_a_choice_of_all_ranks(name: str, world: int):
    rows = job(world).check(name)
    everywhere, routed = rows[0]["forwards"]
    assert routed > everywhere > 0, rows[0]
    print(name, world, [(row["forwards"], row["outline_bytes"]) for row in rows])


def test_messages_of_fixed_sizes():
    job(2).check("fixed")


@pytest.mark.parametrize("world", [2, 4])
def test_bytes_of_a_step_are_those_of_the_formula(world: int):
    job(world).check("bytes of pages")


def test_a_quarter_of_the_shards_takes_a_third_of_the_bytes():
    """Queries and partials, beside those of queries that go everywhere."""
    print(job(4).check("share of pages"))

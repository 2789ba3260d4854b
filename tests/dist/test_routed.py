"""The routed exchange over process groups: the same bits as when every query goes everywhere, and the bytes of the formula."""

import pytest

from pikv_ds.routers import ROUTERS
from tests.dist.jobs.routed import STORAGES, checked
from tests.dist.launcher import JobResult, run_gloo
from tests.long_form import short_or_long

pytestmark = [pytest.mark.dist, pytest.mark.timeout(240)]
ALL = [name for name, router in ROUTERS.items() if not router.reads_all and name not in ("centroids", "cache_aware")]  # refused
# Short: by means, by homes, by what was chosen, by earlier queries; pages by bounds, and for the attention that they hold.
NAMES = short_or_long(["topk", "experts", "load_balanced", "shuffle_shards", "bounds", "page_oracle"], ALL)
OF_FOUR = short_or_long(["topk", "load_balanced", "bounds"], ALL)
WORLDS = pytest.mark.parametrize("world", [2, 4], ids="world{}".format, scope="module")
_jobs: dict[int, JobResult] = {}


def names(world: int) -> list[str]:
    return NAMES if world < 4 else OF_FOUR


def job(world: int) -> JobResult:
    if world not in _jobs:
        _jobs[world] = run_gloo("routed.py", names(world), ranks=world, timeout_s=200)
    return _jobs[world]


CASES = [(name, storage, world) for world in (2, 4) for name in names(world) for storage in STORAGES if checked(name, storage)]


@pytest.mark.parametrize(("name", "storage", "world"), CASES, ids=["-".join(map(str, case)) for case in CASES])
def test_the_answers_of_queries_that_go_everywhere(name: str, storage: str, world: int):
    job(world).check(f"{name} {storage}")


@WORLDS
def test_bytes_of_a_step_are_those_of_the_formula(world: int):
    job(world).check("bytes")


def test_a_quarter_of_the_shards_takes_a_third_of_the_bytes():
    """Queries and partials, beside those of queries that go everywhere."""
    print(job(4).check("share"))


@pytest.mark.parametrize("what", short_or_long(["gone", "reset"], ["gone", "reset", "late"]))
def test_a_rank_that_is_not_there_or_does_something_else(what: str):
    """All others, and it where it lives, end in a PeerError within the time limit."""
    result = run_gloo("routed_faults.py", [what], ranks=2, timeout_s=90)
    rows = [row for row in result.rows if row["check"] == what]
    assert all(row["ok"] for row in rows) and len(rows) == (1 if what == "gone" else 2), result.describe()
    print([(row["rank"], row["waited_s"], row["error_was"]) for row in rows])

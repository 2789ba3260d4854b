"""Ranks out of step: an error with a name on every one of them, no abort, no hang; and what is in step again goes on."""

import pytest

from tests.dist.jobs.mismatch import MEMBERS
from tests.dist.launcher import JobResult, run_gloo
from tests.long_form import LONG, short_or_long

pytestmark = [pytest.mark.dist, pytest.mark.timeout(900)]
_jobs: dict[tuple, JobResult] = {}
ONE_OF_EACH = [
    "different page_size", "different depth", "more_query_heads", "other_batches_of_the_same_requests", "first_forward_beside_lockstep",
    "decoding_beside_lockstep", "more_forwards_on_one_rank", "another_cache", "another_cache_after_a_third", "reset_on_one_rank",
    "raises_midway_and_begins_anew", "interrupted_midway_and_in_lockstep", "leaves_out_a_layer",
    "leaves_out_the_last_layer_of_a_watched_cache", "a_model_raises_in_one_layer", "all_break_off_and_reset",
    "interleaved_caches_switch_by_one_frame", "short_forwards_on_all_ranks",
]  # fmt: skip
CHECKED = short_or_long(ONE_OF_EACH, list(MEMBERS))
# First seed and number of random programs, by ranks.
PROGRAMS = {2: (0, 300), 3: (5000, 150)} if LONG else {2: (0, 3)}


def job(name: str, ranks: int, *args: object) -> JobResult:
    key = (name, ranks, args)
    if key not in _jobs:
        _jobs[key] = run_gloo(name, args, ranks=ranks, timeout_s=800)
    return _jobs[key]


@pytest.mark.parametrize("member", CHECKED)
def test_every_rank_says_so(member: str):
    job("mismatch.py", 2, *CHECKED).check(member)


def test_processes_end_by_themselves():
    """Though collectives that nobody answered are left behind: torch waits for these when a process ends."""
    result = job("mismatch.py", 2, *CHECKED)
    assert result.returncode == 0, result.describe()


@pytest.mark.parametrize("ranks", PROGRAMS, ids="ranks{}".format)
def test_random_programs_with_one_departure(ranks: int):
    """Zero aborts, zero hangs: all ranks end, or each ends with an error that has a name."""
    result = job("mismatch_fuzz.py", ranks, *PROGRAMS[ranks])
    row = result.check("programs")[0]
    assert result.returncode == 0 and sum(row["tally"].values()) == PROGRAMS[ranks][1], result.describe()

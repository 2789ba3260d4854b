"""Ranks out of step: an error with a name on every one of them, no abort, no hang; and what is in step again goes on."""

import pytest

from tests.dist.jobs.mismatch import MEMBERS
from tests.dist.launcher import JobResult, run_gloo

pytestmark = [pytest.mark.dist, pytest.mark.timeout(240)]
_job: list[JobResult] = []


@pytest.mark.parametrize("member", MEMBERS)
def test_every_rank_says_so(member):
    if not _job:
        _job.append(run_gloo("mismatch.py", ranks=2, timeout_s=200))
    _job[0].check(member)


def test_the_processes_end_by_themselves():
    if not _job:
        _job.append(run_gloo("mismatch.py", ranks=2, timeout_s=200))
    assert _job[0].returncode == 0, _job[0].describe()

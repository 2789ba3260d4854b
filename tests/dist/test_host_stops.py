"""How often the host waits for the device in a decode step of two ranks: once, for the header that says what all ranks do."""

import pytest

from tests.dist.jobs import host_stops as job
from tests.dist.launcher import JobResult, run_gloo
from tests.long_form import short_or_long

_jobs: list[JobResult] = []


@pytest.mark.dist
@pytest.mark.parametrize("check", short_or_long(job.SHORT, list(job.CASES)))
def test_two_ranks_read_a_header(check):
    if not _jobs:
        _jobs.append(run_gloo("host_stops.py", ranks=2, timeout_s=240))
    _jobs[0].check(check)

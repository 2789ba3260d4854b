"""Outputs do not depend on which rank holds which shards: whole blocks change places bit for bit, single shards within rounding."""

import pytest

from tests.dist.jobs import shard_map as job
from tests.dist.launcher import JobResult, run_gloo

_jobs: dict[int, JobResult] = {}
CHECKS = [f"{name} {requests}" for name in job.PIECES for requests in ("replicated", "distinct")]
CHECKS = [check for check in CHECKS if check not in [f"{name} replicated" for name in job.ONLY_DISTINCT]]


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("check", CHECKS)
def test_outputs_are_the_same_wherever_shards_lie(world, check):
    if world not in _jobs:
        _jobs[world] = run_gloo("shard_map.py", ranks=world, timeout_s=240)
    _jobs[world].check(check)

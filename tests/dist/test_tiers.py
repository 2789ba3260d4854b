"""Two pools of pages over process groups: one launch per world runs all checks."""

import pytest

from tests.dist.launcher import JobResult, run_gloo

pytestmark = [pytest.mark.dist, pytest.mark.timeout(200)]
CHECKS = ["raw", "adaptive", "routing", "eviction", "collectives", "distinct", "adaptive, distinct"]
_jobs: dict[int, JobResult] = {}


@pytest.mark.parametrize("world", [2, 4], ids="world{}".format)
@pytest.mark.parametrize("check", CHECKS)
def test_pools_do_not_depend_on_ranks(check: str, world: int):
    if world not in _jobs:
        _jobs[world] = run_gloo("tiers.py", ranks=world, timeout_s=180)
    _jobs[world].check(check)

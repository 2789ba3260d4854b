"""Pages in tiers on several ranks: which page lies where is each rank's own affair."""

import pytest

from tests.dist.launcher import run_gloo

pytestmark = [pytest.mark.dist, pytest.mark.timeout(240)]


def test_tiers_on_two_ranks():
    job = run_gloo("offload.py", [], ranks=2, timeout_s=200)
    for name in ("all", "bounds"):
        for requests in ("replicated", "distinct"):
            job.check(f"{name} {requests}")

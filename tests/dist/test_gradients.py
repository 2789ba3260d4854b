"""loss.backward() on ranks that share their entries."""

import pytest

from tests.dist.launcher import run_gloo

pytestmark = [pytest.mark.dist, pytest.mark.timeout(120)]


def test_right_or_refused_on_every_rank():
    result = run_gloo("gradients.py", [], ranks=2, timeout_s=100)
    for requests in ("replicated", "distinct"):
        for check in ("one forward", "after a cached prefix", "the ranks go on"):
            result.check(f"{check}, {requests}")

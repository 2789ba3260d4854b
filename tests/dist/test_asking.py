"""`timeout_s` where a backend's own wait does not hold the host: the host asks, and misses who does not come."""

import pytest

from tests.dist.launcher import run_gloo

pytestmark = pytest.mark.dist


def test_asking_has_a_deadline():
    result = run_gloo("asking.py", timeout_s=60)
    result.check("a rank that is late is waited for")
    result.check("a rank that does not come is missed")

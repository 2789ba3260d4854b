"""A probe on several ranks: a refusal on one is a refusal on all."""

import pytest

from tests.dist.launcher import run_gloo

pytestmark = pytest.mark.dist


def test_all_ranks_hear_of_a_refusal_and_the_group_goes_on():
    result = run_gloo("probe.py", ranks=2)
    for name in ("refused on all", "served"):
        result.check(name)

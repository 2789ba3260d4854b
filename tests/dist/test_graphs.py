"""Steps that are recorded and played on two ranks with the same requests."""

import pytest

from tests.dist.launcher import run_gloo

pytestmark = pytest.mark.dist


def test_replicated_ranks_play_the_same_steps():
    result = run_gloo("graphs.py", timeout_s=90)
    rows = result.check("played steps are steps")
    assert {row["collectives"] for row in rows} == {3}, "one of each layer, and the frame before it"
    result.check("between played steps any other")
    result.check("ranks that play different steps stop, all of them")
    result.check("distinct ranks are refused")

"""A rank of three is killed: the two others find each other, make a group, run the prompt again and give the same tokens."""

import pytest

from tests.dist.launcher import run_gloo
from tests.long_form import LONG

CASES = [(1, "decoding"), (2, "vote")] + [(0, "decoding"), (2, "decoding"), (0, "vote"), (1, "vote")] * LONG


@pytest.mark.dist
@pytest.mark.parametrize(("victim", "when"), CASES)
def test_the_others_go_on(victim, when):
    job = run_gloo("survivors.py", [victim, when], ranks=3, timeout_s=120)
    rows = [row for row in job.rows if row["check"] == "survivors"]
    assert {row["rank"] for row in rows} == {0, 1, 2} - {victim} and all(row["ok"] for row in rows), job.describe()
    assert len({row.get("moved") for row in rows}) == 1

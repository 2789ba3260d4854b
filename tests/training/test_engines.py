"""`pikv train` under the launcher. The long form: `python -m tests.training.engines`, whose rows are docs/results/training_engines.json."""

import json
from pathlib import Path

import pytest

from tests.long_form import LONG
from tests.training.engines import EQUAL, KILLED, apart, kill_and_resume, run

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results" / "training_engines.json"


def test_what_is_committed_is_all_of_it_and_within_its_targets():
    rows = {row["run"]: row for row in json.loads(RESULTS.read_text())["rows"]}
    assert set(rows) == {one for one, _, _ in EQUAL} | {f"{name}, killed and resumed" for name in KILLED}
    assert all(row["loss_apart"] <= row["target"] and row["steps"] == 20 for row in rows.values())


@pytest.mark.skipif(not LONG, reason="long form: the command under the launcher, three times")
@pytest.mark.timeout(1800)
def test_zero_3_and_autoep_killed_and_resumed(tmp_path):
    whole = run("deepspeed zero 1", tmp_path)
    assert apart(kill_and_resume("deepspeed zero 3 autoep", tmp_path), whole) < 1e-4

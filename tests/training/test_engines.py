"""`pikv train` under the launcher. The long form: `python -m tests.training.engines`, whose rows are docs/results/training_engines.json."""

import json
from pathlib import Path

from tests.training.engines import EQUAL, KILLED

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results" / "training_engines.json"


def test_what_is_committed_is_all_of_it_and_within_its_targets():
    rows = {row["run"]: row for row in json.loads(RESULTS.read_text())["rows"]}
    assert set(rows) == {one for one, _, _ in EQUAL} | {f"{name}, killed and resumed" for name in KILLED}
    assert all(row["loss_apart"] <= row["target"] and row["steps"] == 20 for row in rows.values())

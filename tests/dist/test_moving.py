"""Shards that change ranks while requests run change no output: whole blocks bit for bit, single shards within rounding."""

import pytest

from tests.dist.jobs import moving as job
from tests.dist.launcher import JobResult, run_gloo
from tests.long_form import LONG

_jobs: dict[int, JobResult] = {}
SHORT = {2: ["exact", "window", "h2o"], 4: ["bounds"]}
PIECES = {world: list(job.PIECES) if LONG else names for world, names in SHORT.items()}
CHECKS = [(world, f"{name} {requests}") for world, names in PIECES.items() for name in names for requests in ("replicated", "distinct")]


@pytest.mark.dist
@pytest.mark.parametrize(("world", "check"), CHECKS, ids=lambda x: str(x))
def test_outputs_are_the_same_whether_shards_move(world, check):
    if world not in _jobs:
        _jobs[world] = run_gloo("moving.py", PIECES[world], ranks=world, timeout_s=1200 if LONG else 240)
    _jobs[world].check(check)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("world", "message", "how"),
    [(2, 3, "before"), (4, 4, "after")] if not LONG else [(w, m, h) for w in (2, 4) for m in range(6) for h in ("before", "after")],
)
def test_the_others_of_a_rank_that_is_killed_in_a_move_agree(world, message, how):
    killed = run_gloo("moving_killed.py", [world - 1, message, how, 0], ranks=world, timeout_s=120)
    rows = [row for row in killed.rows if row["check"] == "killed"]
    assert len(rows) == world - 1 and all(row["ok"] for row in rows), killed.describe()
    assert len({row["moved"] for row in rows}) == 1 and all(row["seconds_to_error"] < 20 for row in rows), rows

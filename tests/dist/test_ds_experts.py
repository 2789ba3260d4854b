"""AutoEP's experts that change ranks with the shards of their entries: outputs, training and checkpoints are as without."""

import pytest

from tests.dist.launcher import JobResult, run_deepspeed_ranks
from tests.long_form import LONG

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(600)]
SHORT = ("decode distinct lookahead", "training zero1", "checkpoint zero1")
MORE = ("decode replicated previous_layer", "training zero0", "checkpoint zero0", "training zero2")
CHECKS = [(ranks, check) for ranks in ((2, 4) if LONG else (2,)) for check in (SHORT + MORE if LONG else SHORT)]
_jobs: dict[int, JobResult] = {}


@pytest.mark.parametrize(("ranks", "check"), CHECKS)
def test_experts_move_with_their_entries(ranks, check, tmp_path_factory):
    if ranks not in _jobs:
        _jobs[ranks] = run_deepspeed_ranks("ds_experts.py", [tmp_path_factory.mktemp("experts")], ranks=ranks, timeout_s=500)
    _jobs[ranks].check(check)

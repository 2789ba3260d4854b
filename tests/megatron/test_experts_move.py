"""Experts of a Megatron-Core model that change ranks with the shards of their entries."""

import pytest
import torch

from tests.dist.launcher import JobResult, run_gloo
from tests.long_form import LONG
from tests.megatron import JOBS

pytestmark = [
    pytest.mark.dist,
    pytest.mark.timeout(300),
    pytest.mark.skipif(torch.cuda.is_available(), reason="Megatron-Core on CPU and gloo: cpu_compat leaves CUDA alone"),
]
LAYOUTS = {2: ["1,2,1", "2,2,1"] if LONG else ["1,2,1"]} | ({4: ["1,4,1"]} if LONG else {})
CHECKS = (
    "auto previous_layer",
    "distinct lookahead biases",
    *(f"fault in {what}" for what in ("arrived", "said", "leaving")),
    *(f"refuses {what}" for what in ("storage.placement = 'position'", "expert_ids = 'true'", "moe_router_num_groups")),
    "entries alone",
    "disabled and enabled again",
)
_jobs: dict[int, JobResult] = {}


@pytest.mark.parametrize(("ranks", "check"), [(r, f"{layout} {c}") for r, all_ in LAYOUTS.items() for layout in all_ for c in CHECKS])
def test_experts_move_with_their_entries(ranks, check):
    if ranks not in _jobs:
        _jobs[ranks] = run_gloo(JOBS / "experts_move.py", LAYOUTS[ranks], ranks=ranks, timeout_s=240)
    _jobs[ranks].check(check)

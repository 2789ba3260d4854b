"""The model with PiKV in it is the host's model: training, checkpoint keys, round trip; and rows that move or wait."""

import pytest

from tests.dist.launcher import JobResult, run_gloo
from tests.megatron import JOBS
from tests.megatron.marks import on_cpu

pytestmark = [pytest.mark.dist, pytest.mark.timeout(240), on_cpu]
_jobs: dict[int, JobResult] = {}


@pytest.mark.parametrize("world", [1, 2], ids=["world1", "EP2"])
@pytest.mark.parametrize(
    "check",
    [
        "enable and disable leave the model as it was",
        "a model built from a layer spec",
        "a model built from a block spec",
        "training is undisturbed, also after decoding",
        "optimizer steps under DDP with the distributed optimizer",
        "tokens taken back and rows swapped, ids previous_layer",
        "tokens taken back and rows swapped, ids true",
        "a rank that is done keeps step under idle()",
        "a context made and run in any of torch's modes; a backward is refused",
    ],
)
def test_guest(check: str, world: int):
    if world not in _jobs:
        _jobs[world] = run_gloo(JOBS / "guest.py", [f"1,{world},1"], ranks=world, timeout_s=200)
    _jobs[world].check(check)

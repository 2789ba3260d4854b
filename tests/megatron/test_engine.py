"""Megatron's own StaticInferenceEngine and a user's script around PiKV, with the lines that docs/guide/megatron.md shows."""

import pytest

from tests.dist.launcher import JobResult, run_gloo
from tests.megatron import JOBS
from tests.megatron.marks import on_cpu

pytestmark = [pytest.mark.dist, pytest.mark.timeout(240), on_cpu]
LAYOUTS = {"EP2": "1,2,1", "TP2": "2,1,1", "TP2xEP2-peers": "2,2,1"}  # tp,ep,etp on two ranks
_jobs: list[JobResult] = []


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "check",
    [
        "StaticInferenceEngine, in place",
        "StaticInferenceEngine, --spec",
        "an engine that replaces the context is refused",
    ],
)
def test_engine(check: str, layout: str, tmp_path_factory):
    if not _jobs:
        _jobs.append(run_gloo(JOBS / "engine.py", [tmp_path_factory.mktemp("spec"), *LAYOUTS.values()], ranks=2, timeout_s=200))
    _jobs[0].check(f"{LAYOUTS[layout]} {check}")

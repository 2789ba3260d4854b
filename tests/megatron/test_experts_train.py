"""Training and dist checkpoints of Megatron-Core after experts have changed ranks."""

import pytest
import torch

from tests.dist.launcher import run_gloo
from tests.long_form import LONG
from tests.megatron import JOBS

pytestmark = [
    pytest.mark.dist,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(torch.cuda.is_available(), reason="Megatron-Core on CPU and gloo: cpu_compat leaves CUDA alone"),
]
LAYOUTS = ["1,2,1"]  # tensor-parallel ranks train with sequence parallelism, which a context refuses
CHECKS = (
    "losses",
    "distributed optimizer",
    "saved moved, loaded by the host",
    "saved by the host, loaded moved",
    "one key for each expert",
    "weights alone",
)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return run_gloo(JOBS / "experts_train.py", [tmp_path_factory.mktemp("experts"), *LAYOUTS], ranks=2, timeout_s=280)


@pytest.mark.parametrize("check", [f"{layout} {check}" for layout in LAYOUTS for check in CHECKS])
def test_training_and_checkpoints(job, check):
    job.check(check)


@pytest.mark.skipif(not LONG, reason="long form: four ranks")
def test_on_four_ranks(tmp_path):
    job = run_gloo(JOBS / "experts_train.py", [tmp_path, "1,4,1"], ranks=4, timeout_s=280)
    for check in CHECKS:
        job.check(f"1,4,1 {check}")

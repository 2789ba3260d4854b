"""Parts under Megatron-Core's distributed optimizer: the same curve as one process, killed and resumed too, EP2 and TP2."""

import pytest

from tests.dist.launcher import run_gloo
from tests.megatron import JOBS
from tests.megatron.marks import on_cpu

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(200), on_cpu]
LAYOUTS = ["1,2,1", "2,1,1"]  # tp,ep,etp


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return run_gloo(JOBS / "part_fit.py", [tmp_path_factory.mktemp("fits"), *LAYOUTS], ranks=2, timeout_s=180)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("check", ["curve", "resumed", "windows"])
def test_it_is_the_fit_of_one_process_and_the_windows_of_transformers(job, layout, check):
    job.check(f"{layout} {check}")

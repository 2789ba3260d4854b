"""Parts under DeepSpeed: the same curve in all stages of ZeRO, and as one process alone."""

import pytest

from tests.dist.launcher import run_deepspeed_ranks
from tests.long_form import LONG

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(300)]
STAGES = (0, 1, 2, 3) if LONG else (1, 3)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return run_deepspeed_ranks("ds_fit.py", [tmp_path_factory.mktemp("fits")])


@pytest.mark.parametrize("check", [*(f"zero {stage}" for stage in STAGES), "accumulated"])
def test_the_curve_is_that_of_one_process(job, check):
    job.check(check)


@pytest.mark.parametrize("check", ["resumed 1", "resumed 3"] if LONG else ["resumed 3"])
def test_killed_and_resumed_is_the_same_curve(job, check):
    job.check(check)


def test_bf16(job):
    job.check("bf16")


@pytest.mark.parametrize("check", ["base 0", "base 3"])
def test_windows_under_autoep_are_those_of_the_whole_model(job, check):
    job.check(check)

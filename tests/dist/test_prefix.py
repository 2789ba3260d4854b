"""Prefixes on two ranks: pages are spread over both, and what a rank finds is its own affair."""

import pytest

from tests.dist.launcher import JobResult, run_gloo

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]
CHECKS = ["alike, replicated", "alike, distinct", "beams, replicated", "beams, distinct", "auto is refused", "diverged"]


@pytest.fixture(scope="module")
def job() -> JobResult:
    return run_gloo("prefix.py", ["qwen3_moe"], ranks=2, timeout_s=300)


@pytest.mark.parametrize("check", CHECKS)
def test_two_ranks(check: str, job: JobResult):
    job.check(check)

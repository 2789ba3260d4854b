"""Codecs whose maps are folded into queries and outputs, on two ranks."""

import pytest

from tests.dist.jobs.linear import KEPT_BY
from tests.dist.launcher import JobResult, run_gloo

pytestmark = [pytest.mark.dist, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> JobResult:
    return run_gloo("linear.py", [tmp_path_factory.mktemp("linear")], ranks=2, timeout_s=200)


@pytest.mark.parametrize("requests", ["replicated", "distinct"])
@pytest.mark.parametrize(
    "what",
    [
        "qwen3_moe",
        "qwen3_moe ids true",
        "qwen3_moe beams",
        "qwen3_moe rope pre",
        "qwen3_moe svd",
        "qwen3_moe svd window",
        "gpt_oss",
        "gpt_oss svd",
        "gpt_oss svd window",
    ],
)
def test_full_rank_is_exact(job, what, requests):
    job.check(f"{what} {requests}")


@pytest.mark.parametrize("requests", ["replicated", "distinct"])
@pytest.mark.parametrize("method", KEPT_BY)
def test_policies_keep_of_keys_before_their_rotation_what_they_keep_of_raw_ones(job, method, requests):
    job.check(f"kept by {method} {requests}")


@pytest.mark.parametrize("requests", ["replicated", "distinct"])
def test_records_carry_coefficients(job, requests):
    job.check(f"bytes {requests}")

"""The launcher of the distributed tests must itself be able to fail, and must leave nothing running."""

import psutil
import pytest

from tests.dist.launcher import JobTimeout, run_deepspeed, run_gloo

pytestmark = pytest.mark.dist


def processes_naming(word: str) -> list[int]:
    return [p.pid for p in psutil.process_iter(["cmdline"]) if word in (p.info["cmdline"] or [])]


def test_gloo_job_reports_every_rank():
    result = run_gloo("ping.py", ["ok"], timeout_s=60)
    assert [row["total"] for row in result.check("sum")] == [3.0, 3.0]
    assert result.returncode == 0


def test_failed_assertion_is_seen_and_named():
    result = run_gloo("ping.py", ["fail"], timeout_s=60)
    with pytest.raises(AssertionError, match="rank 0 was told to fail"):
        result.check("assertion")
    with pytest.raises(AssertionError, match="ran on 0 of 2 ranks"):
        result.check("no such check")


def test_dead_rank_ends_the_job():
    result = run_gloo("ping.py", ["die"], timeout_s=60)
    assert result.returncode != 0 and result.wall_s < 50


def test_hung_deepspeed_job_is_killed_with_its_children():
    with pytest.raises(JobTimeout, match=r"(?s)killed after 25 s.*checks seen: .*assertion"):
        run_deepspeed("ping.py", ["hang"], timeout_s=25)
    assert processes_naming("pikv-ping-child") == []

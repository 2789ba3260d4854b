"""The launcher of the distributed tests must itself be able to fail, and must leave nothing running."""

import psutil
import pytest

from tests.dist import warm
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


@pytest.fixture(scope="module")
def light():
    """What forks ranks has imported torch only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warm, "PRELOADED", {"dist": ("torch",)})
        patch.setattr(warm, "_parents", {})
        patch.setattr("tests.dist.launcher.LONG", False)
        yield
        for parent in warm._parents.values():
            parent.end()


def test_hung_job_of_forked_ranks_is_killed_with_its_children(light):
    run_gloo("ping.py", ["ok"], timeout_s=60)  # what forks them is there
    with pytest.raises(JobTimeout, match=r"(?s)killed after 4 s.*checks seen: .*assertion"):
        run_gloo("ping.py", ["hang"], timeout_s=4)
    assert processes_naming("pikv-ping-child") == []


def started(*arguments: str, env: dict[str, str] | None = None, ranks: int = 2) -> list[dict]:
    result = run_gloo("started.py", arguments, ranks=ranks, timeout_s=60, env=env)
    assert result.returncode == 4 and all(f"printed by {rank}" in result.output for rank in range(ranks)), result.describe()
    return result.check("started")


def test_a_forked_rank_is_as_one_that_was_started(light):
    """Its arguments and variables, and nothing of the rank that was forked before it."""
    shared = lambda row: {name: value for name, value in row["environment"].items() if name not in warm.OF_ONE_LAUNCH}  # noqa: E731
    forked, again, own = started("a", "b c", ranks=3), started(), started("a", "b c", env={"PIKV_TEST_OWN": "1"})
    for rank, (row, alone) in enumerate(zip(forked, own, strict=False)):
        for name in ("arguments", "path", "main", "leads", "left", "input"):
            assert row[name] == alone[name], name
        assert row["leads"] and row["environment"]["RANK"] == str(rank) and row["environment"]["WORLD_SIZE"] == "3"
        assert shared(row) | {"PIKV_TEST_OWN": "1"} == shared(alone)
    assert all(row["arguments"] == [] and row["left"] is None for row in again)
    for name in ("drawn", "seed"):
        assert len({row[name] for row in forked + again + own}) == 7, name
    assert forked[0]["hash"] != forked[1]["hash"] != forked[2]["hash"]


def test_modules_see_the_variables_of_the_launch(light, monkeypatch):
    """They are read when they are imported: another process forks the ranks."""
    parents = len(warm._parents)
    monkeypatch.setenv("PIKV_TEST_OTHER", "1")
    assert all(row["environment"]["PIKV_TEST_OTHER"] == "1" for row in started())
    assert len(warm._parents) == parents + 2


def test_what_forks_ranks_is_started_again_when_it_has_ended(light):
    run_gloo("ping.py", ["ok"], timeout_s=60)
    for parent in warm._parents.values():
        parent.end()
    assert run_gloo("ping.py", ["ok"], timeout_s=60).returncode == 0

"""The script for the first hour on a GPU, where there is none: what it does with steps that crash or hang; that their commands exist.

`--long`: all three stages as a rehearsal, on the emulator and the CPU ops.
"""

import contextlib
import importlib
import importlib.util
import io
import json
import sys
import time
import warnings

import pytest

from pikv_ds.launch import cli, gpu_first_hour
from pikv_ds.launch.bench import sweep
from pikv_ds.launch.first_hour import ceilings, plan, profile
from pikv_ds.launch.first_hour.runner import LINES, Step, digest, run_steps
from tests.long_form import LONG

SLEEPS = "import time; time.sleep(60)"
HANGS = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {SLEEPS!r}]); print('begun', flush=True); {SLEEPS}"


def _step(name, *codes, limit_s=20.0, **more):
    return Step(name, tuple((sys.executable, "-c", code) for code in codes), limit_s, "nothing", **more)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    out, said = tmp_path_factory.mktemp("hour"), []
    steps = [
        _step("good", "open('{out}/made', 'w').close(); print('lines'); print('41 points, 0 failed')"),
        _step("crashes", "import os; print('before', flush=True); os.abort()"),
        _step("hangs", HANGS, limit_s=1.5),
        _step("several", "print('fine')", "import sys; print('point 7 is wrong'); sys.exit(3)"),
        _step("absent", "print('never')", needs=("no-such-program",)),
        _step("told", "import os; print(os.environ['GIVEN'])", environment={"GIVEN": "a value"}),
        _step("asks", "print(repr(input()))"),
    ]
    started = time.monotonic()
    rows = run_steps(steps, out, 100, said.append)
    return out, {row["step"]: row for row in rows}, said, time.monotonic() - started


def test_the_next_step_runs_whatever_became_of_one(ran):
    out, rows, _, _ = ran
    assert {name: row["status"] for name, row in rows.items()} == {
        "good": "ok", "crashes": "failed", "hangs": "over its limit", "several": "failed", "absent": "skipped", "told": "ok",
        "asks": "failed",
    }  # fmt: skip
    assert rows["good"]["told"] == "41 points, 0 failed" and (out / "made").exists()
    assert rows["crashes"]["statuses"] == [-6] and rows["crashes"]["told"] == "exit status -6: before"
    assert rows["several"]["statuses"] == [0, 3] and rows["several"]["told"] == "exit status 3, 1 of 2 processes: point 7 is wrong"
    assert rows["absent"]["told"] == "no-such-program not found" and rows["told"]["told"] == "a value"
    assert "EOFError" in rows["asks"]["told"], "nothing may wait for input"


def test_a_step_that_hangs_ends_with_all_that_it_started(ran):
    _, rows, _, seconds = ran
    assert 1.5 <= rows["hangs"]["seconds"] < 20 and rows["hangs"]["told"] == "begun" and seconds < 60


def test_everything_is_written(ran):
    out, rows, said, _ = ran
    assert json.loads((out / "steps.json").read_text())["rows"] == list(rows.values())
    assert (out / "several.1.log").read_text().splitlines()[1] == "fine" and (out / "good.log").read_text().startswith("$ ")
    lines = digest(list(rows.values()))
    assert len(lines) <= LINES and any(line.startswith("over its limit") and "hangs: begun" in line for line in lines)
    assert "  several: point 7 is wrong" in lines and [line for line in said if "good" in line]


def test_the_story_is_forty_lines_at_most(ran):
    many = [{"step": f"s{i}", "status": "failed", "seconds": 1.0, "told": "x" * 500, "tail": ["y" * 500] * 3} for i in range(30)]
    assert len(digest(many)) == LINES and max(map(len, digest(many))) <= 180


def test_a_budget_that_is_spent_leaves_the_rest(tmp_path):
    (row,) = run_steps([_step("late", "print('never')")], tmp_path, 1.0, lambda line: None)
    assert row["status"] == "not run" and row["told"] == "the budget of 1 s is spent"


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("stage", plan.STAGES)
def test_every_command_of_a_stage_is_there(stage, device):
    steps = plan.steps_of(stage, device, (9, 0) if device == "cuda" else None)
    assert all(0 < step.limit_s <= 360 for step in steps) and len({step.name for step in steps}) == len(steps)
    for step in steps:
        assert step.environment["PYTHONPATH"] and "expandable_segments:True" in str(step.environment.values())
        assert step.environment.get("PIKV_CUDA_ARCH") == ("90" if device == "cuda" else None)
        for command in step.commands:
            _parses(command[command.index("-m") + 1], list(command[command.index("-m") + 2 :]))


def _parses(module: str, arguments: list[str]) -> None:
    if module == "pytest":
        assert (plan.CHECKOUT / arguments[-1]).is_file(), arguments
    elif module == "pikv_ds.launch.cli":
        cli.build_parser().parse_args(arguments)
    else:
        assert importlib.util.find_spec(module) is not None, module
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown), pytest.raises(SystemExit) as ended:
            importlib.import_module(module).main(["--help"])
        assert ended.value.code == 0
        assert not [name for name in arguments if name.startswith("--") and name not in shown.getvalue()], (module, arguments)


def test_every_op_has_a_process_of_its_own():
    from tests.ops.matrix import points

    assert set(plan.OPS) == {point.op for point in points()}


def test_what_cannot_be_is_said(capsys, tmp_path):
    import torch

    for arguments, words in (
        (["--stage", "1", "--device", "cpu", "--only", "sleep"], "stage 1 has no step sleep; it has ceilings, build, each-op"),
        *([] if torch.cuda.is_available() else [(["--stage", "1"], "torch sees no CUDA device here; --device cpu rehearses")]),
    ):
        with pytest.raises(SystemExit):
            gpu_first_hour.main([*arguments, "--out", str(tmp_path)])
        assert words in capsys.readouterr().err


def test_the_ceilings(capsys):
    assert ceilings.main(["--device", "cpu", "--mib", "1"]) == 0
    assert "GB/s (read plus written), reads" in capsys.readouterr().out


def test_a_sweep_writes_every_row_and_goes_on_after_one_that_fails(tmp_path, monkeypatch):
    def broken(quick):
        def make(device):
            raise RuntimeError("an illegal address\nmore")

        yield {"op": "decode", "format": "bf16", "latent": False}, make

    monkeypatch.setattr(sweep.cases, "decode_options", broken)
    file = tmp_path / "sweep.json"
    rows = sweep.sweep("cpu", quick=True, file=str(file))
    assert json.loads(file.read_text())["rows"] == rows and rows[0]["op"] == "copy" and rows[1]["op"] == "checksum"
    assert [row["error"] for row in rows if row["error"]] == ["an illegal address"]
    assert {row["op"] for row in rows} >= {
        "decode",
        "append",
        "page_bounds",
        "page_score",
        "merge",
        "assign_slots",
        "pack",
        "migrate",
        "prefill_cached",
    }
    assert all(row["graph_ms"] > 0 and row["gbps"] > 0 for row in rows if not row["error"])
    assert "1 failed" in sweep.summary(rows) and "int8" in sweep.summary(rows)
    assert len(sweep.sweep("cpu", quick=True, budget_s=0.0)) == 1


def test_the_whole_sweep_is_planned():
    """Shapes only: nothing is made."""
    rows = [row.facts for row in sweep.planned(False)]
    decodes = [row for row in rows if row["op"] == "decode"]
    assert {row["group"] for row in decodes if not row["latent"]} == {1, 4, 8, 16} and {row["page_size"] for row in decodes} == {16, 32, 64}
    assert {row["group"] for row in decodes if row["latent"]} == {16, 128} and len(rows) > 300
    first = [row for row in decodes[:5]]
    assert first[0]["format"] == "bf16" and {row["format"] for row in decodes[:12]} >= {"bf16", "int8", "int4"}


def test_where_a_stop_came_from():
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
    assert profile.place(heard[0]).startswith("launch/test_gpu_first_hour.py:")


@pytest.mark.skipif(not LONG, reason="long form: PIKV_TEST_LONG=1")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("stage", plan.STAGES)
def test_a_rehearsal(stage, tmp_path, capsys):
    status = gpu_first_hour.main(["--stage", str(stage), "--device", "cpu", "--out", str(tmp_path), "--budget", "1500"])
    said = capsys.readouterr().out
    rows = json.loads((tmp_path / "steps.json").read_text())["rows"]
    assert status == 0 and {row["status"] for row in rows} <= {"ok", "skipped"}, said
    assert len(said.split("---- stage")[1].splitlines()) <= LINES + 1

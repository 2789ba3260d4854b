"""Arguments of the no-edit launcher, as DeepSpeed's launcher passes them."""

import shutil
import subprocess
import sys

import pytest

from pikv_ds.launch.run import split_arguments
from tests.long_form import LONG


@pytest.mark.parametrize(
    "argv, script, arguments",
    [
        (["--local_rank=1", "train.py", "--x", "2"], "train.py", ["--local_rank=1", "--x", "2"]),
        (["--local-rank", "1", "train.py"], "train.py", ["--local-rank", "1"]),
        (["train.py", "--local_rank=0"], "train.py", ["--local_rank=0"]),
    ],
)
def test_local_rank_moves_behind_the_script(argv, script, arguments):
    assert split_arguments(argv) == (script, arguments)


@pytest.mark.parametrize("argv", [[], ["--local_rank=0"], ["--module", "x"]])
def test_missing_script_prints_usage(argv):
    with pytest.raises(SystemExit, match="usage: deepspeed --module pikv_ds.launch.run"):
        split_arguments(argv)


@pytest.mark.skipif(not LONG, reason="two processes with DeepSpeed's probes, in the long form; tests/ops/test_builder.py has its table")
def test_ds_report_has_our_row_under_the_launcher_and_no_seam_for_it_alone():
    script = shutil.which("ds_report")
    lines = {}
    for name, command in (("alone", [sys.executable, script]), ("ours", [sys.executable, "-m", "pikv_ds.launch.run", script])):
        shown = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout.splitlines()
        lines[name] = [line for line in shown if line.startswith(("pikv ", "deepspeed_shm_comm "))]
    assert [line.split()[0] for line in lines["alone"]] == ["deepspeed_shm_comm"]
    assert [line.split()[0] for line in lines["ours"]] == ["deepspeed_shm_comm", "pikv"] and "OKAY" in lines["ours"][1]

"""dist_checkpointing with PiKV in the model, across layouts; `pikv eval` on Megatron-Core, from weights and from a checkpoint."""

import json
import sys

import pytest
import torch

from pikv_ds.launch.cli import build_parser, main
from pikv_ds.launch.evaluation.partial import Partial, key_of
from pikv_ds.launch.evaluation.plan import read_spec
from tests.dist.launcher import run_commands, run_gloo
from tests.long_form import LONG
from tests.megatron import JOBS

pytestmark = [
    pytest.mark.dist,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(torch.cuda.is_available(), reason="Megatron-Core on CPU and gloo: cpu_compat leaves CUDA alone"),
]
LAYOUTS = ["1,2,1", "2,1,1", "2,2,1"]  # tp,ep,etp on two ranks; the first one saves
SWEEP = json.dumps([{}, {"compression": {"method": "int8"}}])
SMALL = ["--context", "160", "--samples", "4" if LONG else "2", "--chunk", "8"]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "bundled"
    return folder, run_gloo(JOBS / "checkpoints.py", [folder, *LAYOUTS], ranks=2, timeout_s=200)


@pytest.fixture(scope="module")
def hf_rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    (folder / "sweep.json").write_text(SWEEP)
    assert main(["eval", *SMALL, "--sweep", str(folder / "sweep.json"), "--json", str(folder / "rows.json")]) == 0
    return rows_of(folder / "rows.json")


def rows_of(file) -> dict:
    return {(row["method"], row["task"]): row for row in json.loads(file.read_text())["rows"]}


CHECKS = ("loads", "decodes over PiKV", "mismatches are refused")


@pytest.mark.parametrize("check", ["1,2,1 the documented lines", *(f"{layout} {what}" for layout in LAYOUTS for what in CHECKS)])
def test_checkpoints_across_layouts(job, check):
    job[1].check(check)


def assert_same_quality(rows: dict, hf_rows: dict) -> None:
    for key, row in rows.items():
        assert row["backend"] == "megatron" and abs((row["recall"] or 0) - (hf_rows[key]["recall"] or 0)) <= 0.01
        assert (row["ppl"] or 0) == pytest.approx(hf_rows[key]["ppl"] or 0, rel=1e-3 if key[0] == "int8" else 1e-5)
    assert rows["exact", "recall"]["recall"] >= 0.95 and abs(rows["exact", "ppl"]["kl"]) < 1e-6
    assert rows["exact", "ppl"]["attention_impl"] == "pikv cpu fp32"
    assert rows["dense", "ppl"]["attention_impl"] == "StaticInferenceContext + DotProductAttention"


def test_one_rank_evaluates_what_two_have_saved(job, hf_rows, tmp_path):
    file, command = tmp_path / "rows.json", [sys.executable, "-m", "pikv_ds.launch.cli", "eval", "--backend", "megatron"]
    (tmp_path / "sweep.json").write_text(SWEEP)
    options = ["--load", str(job[0]), "--sweep", str(tmp_path / "sweep.json"), "--json", str(file)]
    result = run_commands([[*command, *SMALL, *options]], ranks=1, timeout_s=150)
    assert result.returncode == 0, result.describe()
    rows = rows_of(file)
    assert rows.keys() == hf_rows.keys()
    assert_same_quality(rows, hf_rows)
    int8, own = rows["int8", "ppl"], hf_rows["int8", "ppl"]
    assert int8["attention_impl"] == "pikv cpu int8" and 0 < int8["kl"] < 1e-2
    assert int8["bytes_per_token"] == own["bytes_per_token"] < 0.6 * rows["exact", "ppl"]["bytes_per_token"]


def test_torchrun_on_two_expert_parallel_ranks_goes_on_where_it_stopped(hf_rows, tmp_path):
    file = tmp_path / "rows.json"
    spec, units = read_spec(build_parser().parse_args(["eval", "--backend", "megatron", "--ranks", "2", *SMALL]))
    Partial(tmp_path / "rows.json.partial").add(key_of(spec, units[1]), {**hf_rows["dense", "recall"], "backend": "megatron", "seed": 77})
    arguments = [*SMALL, "--json", str(file)]
    if LONG:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
        result = run_commands([[*torchrun, "pikv_ds.launch.jobs.megatron_eval", *arguments]], ranks=2, timeout_s=150)
    else:
        result = run_gloo(JOBS / "evaluate.py", arguments, ranks=2, timeout_s=150)
    assert result.returncode == 0, result.describe()
    assert "1 of 4 units are in" in result.output and not (tmp_path / "rows.json.partial").exists()
    rows = rows_of(file)
    assert rows.keys() == {(method, task) for method in ("dense", "exact") for task in ("ppl", "recall")}
    assert [row["seed"] for row in rows.values()] == [0, 77, 0, 0]
    assert_same_quality(rows, hf_rows)
    exact, dense = rows["exact", "ppl"], rows["dense", "ppl"]
    assert (exact["ranks"], exact["ep"]) == (2, 2)
    assert dense["bytes_per_token"] == 2 * 2048  # every rank holds all of it
    assert max(exact["kv_bytes_per_rank"]) <= 0.72 * max(dense["kv_bytes_per_rank"])

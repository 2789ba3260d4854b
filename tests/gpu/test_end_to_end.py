"""The exact decode and the benchmark on a device."""

import json
import os
import subprocess
import sys

import pytest

from pikv_ds.launch.bench.ops import FORMATS
from tests.gpu.marks import needs_gpu

pytestmark = needs_gpu


def _run(*command: str, **environment: str) -> str:
    env = os.environ | {"PYTHONPATH": os.getcwd()} | environment
    done = subprocess.run([sys.executable, "-m", *command], env=env, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("backend", ["cuda", "nvrtc"])
def test_exact_decode_is_the_hosts(backend):
    if backend == "nvrtc":
        pytest.importorskip("cupy")
    rows = json.loads(_run("tests.adapters.backend_job", PIKV_OPS=backend).splitlines()[-1])
    for row in rows:
        assert row["attention_impl"].startswith(f"pikv {backend} ")
        assert "difference" not in row or (row["tokens_same"] and row["difference"] <= 1e-5), row


def test_the_benchmark_runs(tmp_path):
    report = tmp_path / "bench.json"
    _run("pikv_ds.launch.cli", "bench", "ops", "--device", "cuda", "--quick", "--json", str(report))
    rows = json.loads(report.read_text())["rows"]
    assert {row["format"] for row in rows} == set(FORMATS) and all(0 < row["share"] < 2 for row in rows)

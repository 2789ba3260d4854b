"""The single-process examples run as their own text says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pikv_ds.config.pikv import PiKVConfig

ROOT = Path(__file__).resolve().parents[2]


def run(example, *arguments) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "examples" / example, *arguments]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=110)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.timeout(120)
def test_fit_kv_gate(tmp_path):
    gate = tmp_path / "gate.safetensors"
    said = run("fit_kv_gate.py", gate, "--tokens", "600")
    assert "gate (4, 8, 64)" in said and gate.is_file(), said


@pytest.mark.timeout(120)
def test_fit_router_gate(tmp_path):
    """The fitted gate is legal for the router, and on what it was fitted to better than a choice among four shards by chance."""
    gate = tmp_path / "gate.safetensors"
    said = run("fit_router_gate.py", gate, "--windows", "1", "--context", "256")
    shares = json.loads(said.partition("by layer: ")[2])
    assert "gate (4, 4, 256)" in said and len(shares) == 4 and min(shares) > 0.27 and max(shares) > 0.4, said
    routing = {"method": "learned", "path": str(gate)}
    assert PiKVConfig.parse({"storage": {"num_shards": 4}, "routing": routing}).routing.build().gate.shape == (4, 4, 256)

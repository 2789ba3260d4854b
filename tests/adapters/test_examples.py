"""The single-process examples run as their own text says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(120)
def test_fit_kv_gate(tmp_path):
    gate = tmp_path / "gate.safetensors"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "examples/fit_kv_gate.py", gate, "--tokens", "600"]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=110)
    assert ran.returncode == 0, ran.stderr
    assert "gate (4, 8, 64)" in ran.stdout and gate.is_file(), ran.stdout

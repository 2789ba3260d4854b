"""The examples run as their own text says. More: test_fit_examples.py (weights of policies), test_deepspeed_launch.py."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.dist.launcher import run_gloo

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


def generated(said: str) -> tuple[str, str, str]:
    """Of a line "TEXT expected KEY entries ...": the three."""
    text, _, rest = said.strip().splitlines()[-1].partition(" expected ")
    answer, _, entries = rest.partition(" entries ")
    return text, answer, entries


@pytest.mark.timeout(120)
def test_hf_generate_on_one_process():
    text, answer, entries = generated(run("hf_generate.py"))
    assert answer in text and entries == "[2428]", "600 + 7 entries in 4 layers"


@pytest.mark.dist
@pytest.mark.timeout(240)
@pytest.mark.parametrize("example", ["hf_generate.py", "megatron_generate.py"])
def test_generate_on_two_processes(example):
    job = run_gloo(ROOT / "examples" / example, ranks=2)
    said = re.findall(r"(\d+)\W* expected (\d+) entries (\[[\d, ]+\])", job.output)  # two processes may share a line
    assert job.returncode == 0 and len(said) == 2 and said[0] == said[1], job.describe()
    text, answer, entries = said[0]
    shares = json.loads(entries)
    assert text == answer and sum(shares) == 2428 and min(shares) > 800, said


@pytest.mark.timeout(120)
def test_hf_generate_takes_a_configuration(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"pikv": {"scheduling": {"method": "knorm", "budget_tokens": 320}}}))
    _, _, entries = generated(run("hf_generate.py", tmp_path / "config.json"))
    assert 4 * 64 < json.loads(entries)[0] <= 4 * (320 + 32)


@pytest.mark.timeout(120)
def test_own_method():
    _, _, entries = generated(run("own_method.py"))
    kept, _, left = entries.removeprefix("kept ").partition(" left ")
    assert int(kept) + int(left) == 2428 and int(kept) < 0.6 * 2428, entries

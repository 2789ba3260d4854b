"""PIKV_OPS end to end: exact decode is the host's with every implementation of the ops; on compressed and on selected pages they agree.

cuda and nvrtc need a device: tests/gpu/test_end_to_end.py.
"""

import json
import os
import subprocess
import sys

import pytest

from tests.adapters.backend_job import AGREEING

BACKENDS = ("torch", "cpu", "emu")


@pytest.fixture(scope="module")
def runs():
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-m", "tests.adapters.backend_job"]
    jobs = {
        name: subprocess.Popen(command, env=environment | {"PIKV_OPS": name}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for name in BACKENDS
    }
    found = {}
    for name, job in jobs.items():
        out, err = job.communicate(timeout=280)
        assert job.returncode == 0, f"{name}:\n{err}"
        found[name] = {row["name"]: row for row in json.loads(out.splitlines()[-1])}
    return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_exact_decode_is_the_hosts(runs, backend):
    exact = [row for row in runs[backend].values() if "difference" in row]
    print({row["name"]: f"{row['difference']:.1e}" for row in exact})
    assert len(exact) == 4
    for row in exact:
        assert row["attention_impl"] == f"pikv {backend} fp32", row["attention_impl"]
        assert row["tokens_same"] and row["difference"] <= 1e-5, row


@pytest.mark.parametrize("name", list(AGREEING))
def test_what_is_not_exact_is_the_same_everywhere(runs, name):
    """Codes and bounds are the same bits, so what is left is f32 rounding, and the split of q that reads int8 and int4 on CPU (3e-5)."""
    expected = runs["torch"][name]["logits"]
    for backend in ("cpu", "emu"):
        found = runs[backend][name]
        assert found["attention_impl"].startswith(f"pikv {backend} ")
        difference = max(abs(x - y) for x, y in zip(found["logits"], expected, strict=True))
        print(f"{name} {backend}: {difference:.1e}")
        assert difference <= 1e-4

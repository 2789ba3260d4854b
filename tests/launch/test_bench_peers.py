"""`pikv bench peers`: what runs here runs and is right, what is not installed is named."""

import json

import pytest

from pikv_ds.launch.cli import main
from pikv_ds.launch.peers import environments

LIMITS = {"pikv bf16": 1e-4, "pikv int8 fast": 0.02, "pikv int4": 0.2, "pikv fp4_e2m1": 0.2, "torch SDPA fp32": 1e-5}


def test_runs_what_is_installed(tmp_path, capsys):
    path = tmp_path / "peers.json"
    peers = ["pikv", "torch", "openvino", "llama_cpp"]
    options = ["--context", "2048", "--repeats", "2", "--environments", str(tmp_path), "--json", str(path)]
    assert main(["bench", "peers", "--peers", *peers, *options]) == 0
    rows = json.loads(path.read_text())["rows"]
    measured = {row["case"]: row for row in rows if "ms" in row}
    for case, limit in LIMITS.items():
        row = measured[case]
        assert row["error"] < limit, case
        assert row["repeats"] == 2 and row["ms_min"] <= row["ms"] and row["gbps"] == pytest.approx(row["bytes"] / row["ms"] / 1e6)
    assert {row["peer"] for row in measured.values()} == {"pikv", "torch"}
    assert {row["case"] for row in rows if "not_run" in row} == {"OpenVINO", "llama.cpp"}
    assert "openvino==2026.4.1 is not installed: pikv bench peers --make openvino" in capsys.readouterr().out


def test_a_peer_that_does_not_come_up_is_named(tmp_path, capsys):
    broken = tmp_path / "vllm" / environments.PEERS["vllm"].has
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"no library")
    assert main(["bench", "peers", "--peers", "vllm", "--context", "2048", "--repeats", "1", "--environments", str(tmp_path)]) == 1
    assert "vLLM, SGLang: not run: OSError" in capsys.readouterr().out


def test_refuses_what_no_wheel_brings(tmp_path):
    with pytest.raises(ValueError, match="'llama_cpp' has no packages to install: no wheel on PyPI"):
        environments.make("llama_cpp", tmp_path)

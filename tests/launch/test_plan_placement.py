"""`pikv plan --placement`: its numbers against loops, and what it refuses."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from pikv_ds.launch.cli import main
from tests.launch.test_cli import run_json


def loads_file(tmp_path, **more) -> tuple[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    loads = torch.rand(3, 8, generator=generator).pow(4)
    path = tmp_path / "loads.json"
    path.write_text(json.dumps({"loads": loads.tolist(), **more}))
    return str(path), loads


def peak(loads: torch.Tensor, slots: list) -> float:
    per_rank = [sum(float(loads[e]) / sum(e in own for own in slots) for e in set(rank)) for rank in slots]
    return max(per_rank) / (sum(per_rank) / len(per_rank))


def test_before_and_after_are_what_a_loop_says(tmp_path):
    path, loads = loads_file(tmp_path, bytes=[[10.0 * e for e in range(8)]] * 3)
    before, after, *layers = run_json(tmp_path, "plan", "--placement", path, "--ranks", "4", "--plot", str(tmp_path / "loads.png"))
    blocks = [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert before["peak_over_mean"] == pytest.approx(sum(peak(row, blocks) for row in loads) / 3)
    peaks = [peak(row, one["slots"]) for row, one in zip(loads, layers, strict=True)]
    assert after["peak_over_mean"] == pytest.approx(sum(peaks) / 3)
    assert after["peak_over_mean"] < before["peak_over_mean"]
    moved = sum(10 * e for one in layers for rank, own in enumerate(one["slots"]) for e in own if e not in blocks[rank])
    assert after["bytes_moved"] == moved > 0 == before["bytes_moved"]
    assert (tmp_path / "loads.png").stat().st_size > 1000


def test_a_trace_of_routers_is_counted(tmp_path):
    ids = torch.tensor([[0, 0, 0, 3, 1, 2], [3, 3, 2, 1, 0, 3]])
    save_file({"expert_ids": ids}, tmp_path / "trace.safetensors", {"bytes_per_token": "96", "num_experts": "4"})
    before, *_ = run_json(tmp_path, "plan", "--placement", str(tmp_path / "trace.safetensors"), "--ranks", "2")
    assert before["peak_over_mean"] == pytest.approx((4 / 3 + 4 / 3) / 2) and before["experts"] == 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", "'loads'"),
        ('{"loads": [1, 2]}', r"legal is \[layers\]"),
        ('{"loads": [[1, -1]]}', "not negative"),
        ("no", "no file of loads"),
    ],
)
def test_what_is_no_file_of_loads_is_refused(tmp_path, capsys, text, said):
    path = tmp_path / "loads.json"
    path.write_text(text)
    assert main(["plan", "--placement", str(path), "--ranks", "2"]) == 2
    assert re.search(said, capsys.readouterr().err)


def test_a_plan_of_bytes_needs_a_context(capsys):
    assert main(["plan", "--ranks", "2"]) == 2
    assert "--context is not given" in capsys.readouterr().err

"""`pikv bench ops`: its rows, the threads that a row may use, and what its targets are judged on."""

import json

import pytest
import torch

from pikv_ds.launch.bench.ops import FORMATS, Times, _rows_of
from pikv_ds.launch.bench.targets import judge
from pikv_ds.launch.cli import main
from pikv_ds.ops.build import load

COLUMNS = [
    "op",
    "format",
    "group",
    "batch",
    "context",
    "threads",
    "ms",
    "cpu_ms",
    "baseline",
    "baseline_ms",
    "ratio",
    "gbps",
    "stream_gbps",
]
ALL = {"sdpa_grouped", "sdpa_gqa", "stream"}
FAST = ("int8", "int4", "int2")
COMPRESSED = ALL | {"dequant_sdpa", "sdpa_on_dequantised", "own_bf16"}


def test_quick(tmp_path, capsys):
    path, threads = tmp_path / "ops.json", torch.get_num_threads()
    assert main(["bench", "ops", "--quick", "--threads", "1", "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    assert torch.get_num_threads() == threads
    assert (
        document["command"] == "bench ops --quick --threads 1" and document["targets"] == [] and "sdpa_grouped" in capsys.readouterr().out
    )
    seen = {}
    for row in document["rows"]:
        assert list(row)[: len(COLUMNS)] == COLUMNS
        assert (row["op"], row["group"], row["batch"], row["context"], row["threads"]) == ("decode", 4, 1, 2048, 1)
        assert row["ratio"] == pytest.approx(row["baseline_ms"] / row["ms"]) and row["gbps"] == pytest.approx(
            row["bytes"] / row["ms"] / 1e6
        )
        assert row["ms_p20"] <= row["ms_p80"] and row["ratio_p20"] <= row["ratio_p80"] and row["repeats"] == 3
        seen.setdefault((row["format"], row["pages"]), set()).add(row["baseline"])
    first = {"first_bf16"} if load.cpu_kernels()["vnni"] else set()
    for name in FAST:
        assert seen.pop((f"{name} fast", "contiguous")) == {"high", "stream"} | first
    assert seen.pop(("bf16", "contiguous")) == ALL | first and seen.pop(("bf16", "random")) == ALL | {"contiguous"}
    assert seen == {
        (name, order): COMPRESSED | ({"contiguous"} if order == "random" else first)
        for name in FORMATS[1:]
        for order in ("contiguous", "random")
    }


def test_pages_only():
    args = ["bench", "ops", "--quick", "--threads", "1", "--pages-only"]
    assert main(args) == 0


def _rows(threads, cpu_share=1.0, random_ms=13.0):
    """What a run would give in which decode takes 10 ms, and a baseline 40."""
    common = {"group": 4, "batch": 1, "context": 32768, "threads": threads}
    times = {}
    for name in ("bf16", "int8", "int4"):
        times |= {
            f"{name} contiguous": 10.0,
            f"{name} random": random_ms,
            f"dequant_sdpa {name}": 400.0,
            f"sdpa_on_dequantised {name}": 40.0,
        }
    times |= {"sdpa_grouped bf16": 50.0, "sdpa_grouped fp32": 40.0, "sdpa_gqa bf16": 400.0, "sdpa_gqa fp32": 90.0, "stream": 40.0}
    times = {name: Times([ms] * 3, [ms * threads * cpu_share] * 3) for name, ms in times.items()}
    if threads == 1:
        times["bf16 first contiguous"] = Times([20.0] * 3, [20.0 * cpu_share] * 3)
    return [row for name in ("bf16", "int8", "int4") for row in _rows_of(name, 1 << 27, times, common, 1 << 29)]


def test_targets_that_are_met():
    one, two = judge(_rows(1)), judge(_rows(2))
    assert len(one) == 12 and all(row["met"] for row in one), one
    assert {row["target"]: row["measured"] for row in one}["bf16 at least 3 x sdpa_grouped, B=1 L=32k, 1 thread"] == 4.0
    assert one[0]["at_stream"] == pytest.approx(4.0) and one[5]["at_stream"] is None  # 2^27 bytes in 10 ms, as the stream reads 2^29 in 40
    assert [row["target"] for row in two] == [f"{name} not slower than bf16, B=1 L=32k, 2 threads" for name in ("int8", "int4")]
    assert all(row["met"] for row in two)


def test_a_cost_beyond_its_limit_is_not_met():
    missed = [row for row in judge(_rows(1, random_ms=14.0)) if not row["met"]]
    assert len(missed) == 3 and all("random pages" in row["target"] and row["measured"] == pytest.approx(1.4) for row in missed)


def test_a_row_that_used_more_threads_than_it_says_counts_for_nothing():
    rows = _rows(1, cpu_share=1.2)
    assert not any(row["valid"] for row in rows) and not any(row["met"] for row in judge(rows))
    assert all(row["valid"] for row in _rows(1, cpu_share=1.05))

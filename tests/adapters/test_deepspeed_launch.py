"""Ways to start: the no-edit module, the examples, two emulated nodes."""

import json
import sys
from pathlib import Path

import pytest

from pikv_ds.launch.ranks import free_port
from tests.dist.launcher import JOBS, run_commands, run_deepspeed, run_deepspeed_ranks

pytestmark = [pytest.mark.dist, pytest.mark.slow]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
STATS = "kv_bytes_allocated"


def text_of(result) -> str:
    """What the example printed: the line that begins with its default prompt, to the statistics."""
    assert result.returncode == 0, result.describe()
    start = result.output.index("The history of the town begins")
    return result.output[start:].split("{'kv_bytes")[0].split("[2")[0].strip()


@pytest.fixture(scope="module")
def dense_text():
    return text_of(
        run_deepspeed(EXAMPLES / "deepspeed_generate.py", ["--deepspeed_config", EXAMPLES / "ds_config_replicated.json"], timeout_s=120)
    )


@pytest.mark.parametrize("config", ["ds_config_autoep.json", "ds_config_replicated.json"])
def test_unmodified_script_honours_the_block(dense_text, config):
    result = run_deepspeed(
        "pikv_ds.launch.run",
        [EXAMPLES / "deepspeed_generate.py", "--deepspeed_config", EXAMPLES / config],
        launcher_args=["--module"],
        timeout_s=120,
    )
    assert STATS in result.output, result.describe()
    assert text_of(result) == dense_text


def test_train_then_generate_example():
    result = run_deepspeed(EXAMPLES / "train_then_generate.py", timeout_s=120)
    assert result.returncode == 0 and "step 1: loss" in result.output and STATS in result.output, result.describe()


def test_rebalance_example(tmp_path):
    file = tmp_path / "rows.json"
    result = run_deepspeed(EXAMPLES / "rebalance.py", ["--steps", "8", "--json", file], timeout_s=120)
    assert result.returncode == 0, result.describe()
    before, after = json.loads(file.read_text())["rows"]
    assert before["placement"] == "before" and after["placement"] == "after" and after["tokens_equal"]
    assert after["peak_over_mean"] < before["peak_over_mean"] and after["bytes_moved"] > 0 and after["experts_moved"] > 0
    assert all(row[f"step_ms_{p}"] > 0 for row in (before, after) for p in ("p50", "p99"))


def test_two_nodes_without_ssh(tmp_path):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("node0 slots=1\nnode1 slots=1\n")
    port = str(free_port())
    commands = [
        [
            sys.executable,
            "-m",
            "deepspeed.launcher.runner",
            "--hostfile",
            str(hostfile),
            "--no_ssh",
            "--no_ssh_check",
            "--node_rank",
            str(node),
            "--master_addr",
            "127.0.0.1",
            "--master_port",
            port,
            str(JOBS / "ds_pairs.py"),
        ]
        for node in range(2)
    ]
    rows = run_commands(commands, ranks=2, timeout_s=120).check("pairs")
    assert [(row["node"], row["local_size"], row["world"]) for row in rows] == [("0", "1", 2), ("1", "1", 2)]
    assert [row["group"] for row in rows] == [[0, 1], [0, 1]]


def test_two_expert_parallel_groups_in_one_job():
    rows = run_deepspeed_ranks("ds_pairs.py", ranks=4, timeout_s=150).check("pairs")
    assert [row["group"] for row in rows] == [[0, 1], [0, 1], [2, 3], [2, 3]]

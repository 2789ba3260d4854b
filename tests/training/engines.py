"""`pikv train` under every engine, as a user starts it: one curve. A rank killed with SIGKILL and --resume: the same curve.

    python -m tests.training.engines --json FILE [--only WORD]

Each run is a process of its own under DeepSpeed's launcher.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pikv_ds.launch.output import write_json

STEPS, EVERY = 20, 5
FIT = ["--context", "256", "--samples", "12", "--facts", "8", "--steps", str(STEPS), "--every", str(EVERY), "--patience", "0"]
AUTOEP = {"expert_parallel": {"enabled": True, "autoep_size": 2}}
# name -> (engine and ranks, ds.json)
RUNS: dict[str, tuple[list[str], dict | None]] = {
    "local": (["--engine", "local"], None),
    "deepspeed zero 1": (["--engine", "deepspeed", "--ranks", "2"], {"zero_optimization": {"stage": 1}}),
    "deepspeed zero 2": (["--engine", "deepspeed", "--ranks", "2"], {"zero_optimization": {"stage": 2}}),
    "deepspeed zero 3 autoep": (["--engine", "deepspeed", "--ranks", "2"], {"zero_optimization": {"stage": 3}, **AUTOEP}),
    "deepspeed zero 1 autoep bf16": (
        ["--engine", "deepspeed", "--ranks", "2"],
        {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}, **AUTOEP},
    ),
    "megatron ep 2": (["--engine", "megatron", "--ranks", "2"], None),
    "megatron tp 2": (["--engine", "megatron", "--ranks", "2", "--tp", "2"], None),
}
# (run, the run it must equal, how far losses may be apart)
EQUAL = [
    ("deepspeed zero 2", "deepspeed zero 1", 1e-4),
    ("deepspeed zero 3 autoep", "deepspeed zero 1", 1e-4),
    ("megatron ep 2", "deepspeed zero 1", 1e-3),
    ("megatron tp 2", "local", 1e-3),
    ("deepspeed zero 1 autoep bf16", "deepspeed zero 1", 0.05),
]
KILLED = ("deepspeed zero 3 autoep", "megatron ep 2")


def command(name: str, folder: Path, more: list[str] = ()) -> list[str]:
    given, config = RUNS[name]
    label = name.replace(" ", "_")
    words = [*given, *FIT, "--out", str(folder / f"{label}.safetensors"), "--json", str(folder / f"{label}.json"), *more]
    if config is not None:
        (folder / f"{label}.ds.json").write_text(json.dumps(config))
        words += ["--config", str(folder / f"{label}.ds.json")]
    return [sys.executable, "-m", "pikv_ds.launch.cli", "train", "kv_gate", *words]


def curve(name: str, folder: Path) -> list[dict[str, float]]:
    return json.loads((folder / f"{name.replace(' ', '_')}.json").read_text())["rows"]


def run(name: str, folder: Path, more: list[str] = ()) -> list[dict[str, float]]:
    done = subprocess.run(command(name, folder, more), capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, f"{name}: exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return curve(name, folder)


def kill_and_resume(name: str, folder: Path) -> list[dict[str, float]]:
    """SIGKILL to a rank once the checkpoint of step 10 is there. The command says so; --resume ends the fit."""
    process = subprocess.Popen(command(name, folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    latest, until = folder / f"{name.replace(' ', '_')}.fit" / "latest", time.monotonic() + 600
    while not (latest.is_file() and latest.read_text() == f"step_{2 * EVERY}"):
        assert process.poll() is None and time.monotonic() < until, process.communicate()[0][-3000:]
        time.sleep(0.02)
    ranks = _ranks(process.pid)
    assert ranks, "the ranks are gone"
    os.kill(ranks[-1], signal.SIGKILL)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 1 and "--resume goes on from the last" in said, said[-3000:]
    rows = run(name, folder, ["--resume"])
    assert len(rows) == STEPS
    return rows


def apart(one: list[dict[str, float]], other: list[dict[str, float]]) -> float:
    return max(abs(a["loss"] - b["loss"]) for a, b in zip(one, other, strict=True))


def _ranks(parent: int) -> list[int]:
    """Ranks that descend from that process."""
    parents, found = {}, []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
            words = (stat.parent / "cmdline").read_text().split("\0")
        except OSError:  # ended meanwhile
            continue
        if "pikv_ds.launch.training.job" in words and "deepspeed.launcher.launch" not in words and "deepspeed.launcher.runner" not in words:
            found.append(int(stat.parent.name))
    return sorted(pid for pid in found if _descends(pid, parent, parents))


def _descends(pid: int, parent: int, parents: dict[int, int]) -> bool:
    while pid in parents:
        pid = parents[pid]
        if pid == parent:
            return True
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", required=True, metavar="FILE")
    parser.add_argument("--only", default="", metavar="WORD")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        curves = {name: run(name, folder) for name in RUNS if args.only in name}
        rows = [
            {"run": one, "equals": other, "loss_apart": apart(curves[one], curves[other]), "target": target, "steps": STEPS}
            for one, other, target in EQUAL
            if one in curves and other in curves
        ]
        (folder / "killed").mkdir()
        for name in KILLED:
            if name in curves:
                rows.append({"run": f"{name}, killed and resumed", "equals": name, "target": 1e-6, "steps": STEPS})
                rows[-1]["loss_apart"] = apart(kill_and_resume(name, folder / "killed"), curves[name])
        for row in rows:
            print(row, flush=True)
        write_json(
            args.json, "tests.training.engines", rows, curves=[{"run": name, **row} for name, found in curves.items() for row in found]
        )
        assert all(row["loss_apart"] <= row["target"] for row in rows)


if __name__ == "__main__":
    main()

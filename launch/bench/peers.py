"""`pikv bench peers`: decode attention of other projects beside ours, on the same queries, keys and values.

Each peer is a process of its own (launch/peers/with_NAME.py) over packages of its own, in a folder that `--make` fills from PyPI. All
wait while one computes; they take turns A B C ... A B C ..., each after one call that is not timed. One that is not installed is named.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from pikv_ds.launch.output import print_table, write_json
from pikv_ds.launch.peers import environments
from pikv_ds.launch.peers.environments import PEERS

TURN_MS = 60.0  # of one measurement


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = {"nargs": "+", "choices": list(PEERS), "metavar": "NAME"}
    parser.add_argument("--peers", **names, default=list(PEERS), help=f"of {', '.join(PEERS)} (default all)")
    parser.add_argument("--make", **names, help="install these from PyPI into their folders, and stop")
    parser.add_argument("--environments", default=".peers", metavar="DIR", help="where the folders of packages lie (default .peers)")
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="requests (default 1)")
    parser.add_argument("--context", type=int, default=32768, metavar="N", help="tokens of each, a multiple of 2048 (default 32768)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of each peer (default 1)")
    parser.add_argument("--repeats", type=int, default=9, metavar="N", help="turns (default 9)")


def run(args: argparse.Namespace) -> int:
    """0; 1 when a peer that is installed did not come up."""
    root = Path(args.environments).resolve()
    if args.make:
        for name in args.make:
            environments.make(name, root)
        return 0
    if args.context < 2048 or args.context % 2048:
        raise ValueError(f"--context {args.context} is not a multiple of 2048, which all peers' blocks divide")
    absent = {name: reason for name in args.peers if (reason := environments.why_missing(name, root))}
    with tempfile.TemporaryDirectory() as folder:
        rows, failed = _measure(args, root, Path(folder), [name for name in args.peers if name not in absent])
    rows.sort(key=lambda row: row["cpu_ms_min"])
    title = f"Decode attention, {args.batch} x {args.context} tokens, 32 query and 8 KV heads of 128, {args.threads} thread(s)"
    shown = ("case", "cpu_ms_min", "ms", "ms_min", "gbps", "error")
    if rows:
        print_table(f"{title}: median of {args.repeats}, in turns", [{key: _short(row[key]) for key in shown} for row in rows])
    for name, reason in (absent | failed).items():
        print(f"{PEERS[name].title}: not run: {reason}")
    not_run = [{"case": PEERS[name].title, "not_run": reason} for name, reason in (absent | failed).items()]
    write_json(args.json, "bench peers", rows + not_run)
    return 1 if failed else 0


def _measure(args: argparse.Namespace, root: Path, folder: Path, names: list[str]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Rows, and why a peer did not come up."""
    from pikv_ds.launch.peers import data

    data.write(folder, args.batch, args.context)
    workers: dict[str, subprocess.Popen[str]] = {}
    cases: dict[str, tuple[str, dict[str, Any]]] = {}  # name of a case -> its peer, what it said of itself
    failed = {}
    try:
        for name in names:
            log = folder / f"{name}.log"
            worker = workers[name] = environments.start(name, root, [str(folder), str(args.threads)], args.threads, log)
            line = worker.stdout.readline()
            if line:
                cases |= {case: (name, said) for case, said in json.loads(line).items()}
            else:
                failed[name] = log.read_text().strip().splitlines()[-1]
        turns: dict[str, list[dict[str, float]]] = {case: [] for case in cases}
        for _ in range(args.repeats):
            for case, (name, said) in cases.items():
                turns[case].append(_ask(workers[name], case, max(1, round(TURN_MS / said["ms"]))))
    finally:
        for worker in workers.values():
            worker.stdin.close()
            worker.wait()
    common = {"batch": args.batch, "context": args.context, "threads": args.threads, "repeats": args.repeats}
    load = round(os.getloadavg()[0], 1)
    return [_row(case, name, said, turns[case], common | {"load": load}) for case, (name, said) in cases.items()], failed


def _ask(worker: subprocess.Popen[str], case: str, calls: int) -> dict[str, float]:
    worker.stdin.write(json.dumps({"case": case, "calls": calls}) + "\n")
    worker.stdin.flush()
    return json.loads(worker.stdout.readline())


def _row(case: str, name: str, said: dict[str, Any], turns: list[dict[str, float]], common: dict[str, Any]) -> dict[str, Any]:
    ms = [turn["ms"] for turn in turns]
    return {
        "case": case, "peer": name, **common, "ms": median(ms), "ms_min": min(ms), "cpu_ms": median(turn["cpu_ms"] for turn in turns),
        "cpu_ms_min": min(turn["cpu_ms"] for turn in turns), "bytes": said["bytes"], "gbps": said["bytes"] / median(ms) / 1e6,
        "error": said["error"], "note": said["note"],
    }  # fmt: skip


def _short(value: Any) -> Any:
    return float(f"{value:.3g}") if isinstance(value, float) else value

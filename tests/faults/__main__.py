"""Faults in forwards and generates, many of them: everybody is told by name, nothing is given out that is silently another, nobody hangs.

    python -m tests.faults --random 1000 --processes 100 --json rows.json
    python -m tests.faults --list                            the kinds

--random: simulated ranks, every kind of tests/faults/simulated.py in turn. --processes: generates on 2 gloo ranks that one of them breaks
off, each followed by a fresh one. Faults of moves have a command of their own, `python -m tests.migration_faults`. Ctrl-C ends it with
the rows so far.

Exit 1: a fault that was not named, an output that is another, or a rank that hangs.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from typing import Any

import torch

from pikv_ds.launch.output import print_table, write_json
from tests.dist.launcher import JobTimeout, run_gloo

from .simulated import KINDS, one

AT_ONCE = 20
"""Generates of one pair of processes."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description="Faults in forwards and generates.")
    parser.add_argument("--random", type=int, default=0, metavar="N", help="faults on simulated ranks")
    parser.add_argument("--processes", type=int, default=0, metavar="N", help="generates of processes that are broken off")
    parser.add_argument("--seed", type=int, default=0, help="of the first (default 0)")
    parser.add_argument("--json", metavar="FILE", help="write a row per kind and outcome, and one per fault that went wrong")
    parser.add_argument("--list", action="store_true", help="print the kinds and end")
    args = parser.parse_args()
    if args.list:
        print("\n".join(KINDS))
        return 0
    torch.set_num_threads(1)
    began, found = time.monotonic(), []
    try:
        for i in range(args.random):
            found.append({"ranks": "simulated", **outcome(args.seed + i)})
        for first in range(0, args.processes, AT_ONCE):
            found += interrupted(args.seed + first, min(AT_ONCE, args.processes - first))
    except KeyboardInterrupt:
        print(f"stopped after {len(found)} of {args.random + args.processes}")
    wrong = [row for row in found if "wrong" in row]
    counts = Counter((row["ranks"], row["kind"], row["outcome"]) for row in found if "wrong" not in row)
    rows = [{"ranks": ranks, "kind": kind, "outcome": what, "faults": count} for (ranks, kind, what), count in sorted(counts.items())]
    title = f"{len(found)} faults in {time.monotonic() - began:.0f} s, seeds from {args.seed}, {len(wrong)} wrong"
    print_table(title, rows) if rows else print(title)
    for row in wrong:
        print(f"wrong: {row['kind']}, seed {row['seed']}: {row['wrong']}")
    write_json(args.json, "tests.faults", [*rows, *wrong])
    return int(bool(wrong))


def outcome(seed: int) -> dict[str, Any]:
    try:
        return one(seed)
    except AssertionError as error:
        return {"seed": seed, "kind": list(KINDS)[seed % len(KINDS)], "wrong": str(error)[-2000:]}


def interrupted(seed: int, count: int) -> list[dict[str, Any]]:
    """`count` generates of one job."""
    try:
        job = run_gloo("interrupted.py", [seed, count], ranks=2, timeout_s=60 + 30 * count)
    except JobTimeout as error:
        return [{"ranks": "processes", "seed": seed, "kind": "interrupted", "wrong": str(error)[:2000]}]
    rows = [row for row in job.rows if row["rank"] == 0]
    bad = {row["check"]: f"rank {row['rank']}: {row['error']}" for row in job.rows if not row["ok"]}
    if len(rows) != count:
        return [{"ranks": "processes", "seed": seed, "kind": "interrupted", "wrong": job.describe()[:2000]}]
    return [
        {"ranks": "processes", "seed": row["check"], "kind": row["kind"], "outcome": row.get("outcome", "none")}
        | ({"wrong": bad[row["check"]][-2000:]} if row["check"] in bad else {})
        for row in rows
    ]  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())

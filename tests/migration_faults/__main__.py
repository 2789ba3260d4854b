"""Many moves of shards, each with a fault: committed on all ranks that are left, or on none, and no entry lost.

    python -m tests.migration_faults --random 1000 --json rows.json         simulated ranks, a fault at a drawn message
    python -m tests.migration_faults --processes 100 --json rows.json       2 and 4 gloo ranks, one ends itself by SIGKILL

The phases are those of a move: "agreeing" on it, copying pages "ahead" and the "forward"s between, "leaving" (what is missing is sent),
"vote". A fault: a rank dies before or after it has sent a message, which may then reach only some of the others; a message is lost; with
processes also at a moment that a timer chooses. Ctrl-C ends it with the rows so far.

Exit 1: a mixed state, a lost entry, or a rank that hangs.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from typing import Any

import torch
from rich.progress import track

from pikv_ds.launch.output import print_table, write_json
from tests.dist.launcher import JobTimeout, run_gloo
from tests.migration.faults import PHASES, random_trial


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.migration_faults", description="Moves of shards with faults.")
    parser.add_argument("--random", type=int, default=0, metavar="N", help="moves on simulated ranks")
    parser.add_argument("--processes", type=int, default=0, metavar="N", help="moves of processes, one of which is killed")
    parser.add_argument("--seed", type=int, default=0, help="of the first move (default 0)")
    parser.add_argument("--json", metavar="FILE", help="write a row per phase, and one per move that went wrong")
    args = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    rows: list[dict[str, Any]] = []
    for kind, count, one in (("simulated", args.random, random_trial), ("processes", args.processes, killed)):
        found = []
        try:
            for i in track(range(count), description=kind, console=None, transient=True):
                found.append(outcome(one, args.seed + i))
        except KeyboardInterrupt:
            print(f"{kind}: stopped after {len(found)} of {count}")
        rows += [summary(kind, phase, [row for row in found if row["phase"] == phase]) for phase in PHASES if found]
        rows += [{"ranks": kind, **row} for row in found if "wrong" in row]
    totals = [row for row in rows if "wrong" not in row]
    print_table(f"{sum(row['moves'] for row in totals)} moves in {time.monotonic() - began:.0f} s, seeds from {args.seed}", totals)
    write_json(args.json, "tests.migration_faults", rows)
    return int(any("wrong" in row for row in rows))


def outcome(one, seed: int) -> dict[str, Any]:
    try:
        return one(seed)
    except (AssertionError, JobTimeout) as error:
        return {"seed": seed, "phase": "?", "wrong": str(error)[:2000]}


def summary(kind: str, phase: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    became = Counter(row["outcome"] for row in rows)
    return {
        "ranks": kind, "phase": phase, "moves": len(rows), "committed": became["committed"], "rolled back": became["rolled back"],
        "in doubt": sum(row["in_doubt"] > 0 for row in rows), "2 ranks": sum(row["world"] == 2 for row in rows),
        "4 ranks": sum(row["world"] == 4 for row in rows), "slowest error, s": max((row.get("seconds", 0.0) for row in rows), default=0.0),
    }  # fmt: skip


def killed(seed: int) -> dict[str, Any]:
    """One move of processes."""
    draw = random.Random(seed)
    world, ahead = draw.choice((2, 4)), draw.choice((0, 0, 1500))
    how = draw.choice(("before", "after", "timer"))
    message = draw.randrange(6 if not ahead else 24)
    when = f"{draw.uniform(0, 30 if not ahead else 120):.2f}" if how == "timer" else how
    job = run_gloo("moving_killed.py", [draw.randrange(world), message, when, ahead], ranks=world, timeout_s=60)
    rows = [row for row in job.rows if row["check"] == "killed"]
    assert len(rows) == world - 1, job.describe()
    assert all(row["ok"] for row in rows), job.describe()
    assert len({row["moved"] for row in rows}) == 1, rows
    return {
        "seed": seed, "world": world, "how": how, "phase": rows[0]["phase"], "in_doubt": sum(row["in_doubt"] for row in rows),
        "outcome": "committed" if rows[0]["moved"] else "rolled back", "seconds": max(row["seconds_to_error"] for row in rows),
    }  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())

"""What a move of shards costs the forwards beside it: 2 gloo ranks, idle and moving blocks in turns, and idle beside idle as the control.

    python -m tests.stall --json rows.json                 5 runs of 2,000 moving steps, about 8 minutes on an idle machine of 2 cores
    python -m tests.stall --runs 1 --rounds 1 --steps 20   a look

A round is four blocks: idle, moving, idle, idle as the control. Pages are copied ahead, `--bytes-per-step` of a rank after each forward; a
block of moving steps is one move after the other. A ratio is of the medians (or the 99th percentiles) of all steps of a run and kind over
those of the idle blocks right before them; shown are the median and the range over the runs. stall: how long a commit kept a forward
waiting.
Wall times mean something on an idle machine only; CPU time is that of the thread that decodes.

Exit 1: pages that arrived are not, byte for byte in number, those that the moves were to send.
"""

from __future__ import annotations

import argparse
import sys
from statistics import median
from typing import Any

from pikv_ds.launch.output import print_table, write_json
from tests.dist.launcher import run_gloo


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.stall", description="Decode steps while shards move.")
    parser.add_argument("--runs", type=int, default=5, help="caches, one after the other (default 5)")
    parser.add_argument("--rounds", type=int, default=10, help="of four blocks, in a run (default 10)")
    parser.add_argument("--steps", type=int, default=200, help="decode steps of a block (default 200)")
    parser.add_argument("--bytes-per-step", type=int, default=1 << 16, help="that a rank copies ahead per step (default 65536)")
    parser.add_argument("--tokens", type=int, default=2048, help="of every prompt, of 4 requests (default 2048)")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds (default 1800)")
    parser.add_argument("--json", metavar="FILE", help="write a row per block, and the summary")
    args = parser.parse_args()
    job = run_gloo("stall.py", [args.runs, args.rounds, args.steps, args.bytes_per_step, args.tokens], ranks=2, timeout_s=args.timeout)
    blocks = [row for row in job.rows if row["check"] == "block" and row["rank"] == 0]
    if job.returncode or not all(row["ok"] for row in job.rows):
        print(job.describe())
        return 1
    rows = [summary(blocks, kind, clock) for kind in ("moving", "control") for clock in ("wall_ms", "cpu_ms")]
    moves = [row for row in blocks if row["kind"] == "moving"]
    stalls = [ms for row in moves for ms in row["stall_ms"]]
    bytes_row = {
        "moves": sum(row["moves"] for row in moves), "stall_ms": median(stalls), "stall_ms_max": max(stalls),
        **{name: sum(row[name] for row in moves) for name in ("bytes_planned", "bytes_arrived", "bytes_sent", "bytes_again")},
        "steps_of_a_move": sum(len(row["wall_ms"]) for row in moves) / sum(row["moves"] for row in moves),
    }  # fmt: skip
    print_table(
        f"2 ranks, {args.runs} runs of {args.rounds} rounds, blocks of {args.steps} steps, {args.bytes_per_step} bytes per step", rows
    )
    print_table("Moves", [bytes_row])
    for row in blocks:
        row |= {name: [round(ms, 3) for ms in row[name]] for name in ("wall_ms", "cpu_ms", "stall_ms") if name in row}
    write_json(args.json, "tests.stall", [*rows, bytes_row, *blocks])
    return int(any(row["bytes_planned"] != row["bytes_arrived"] for row in moves))


def summary(blocks: list[dict[str, Any]], kind: str, clock: str) -> dict[str, Any]:
    """Of each run: all steps of a kind, and those of the idle blocks right before them."""
    neighbours = [(a, b) for a, b in zip(blocks, blocks[1:], strict=False) if a["kind"] == "idle" and b["kind"] == kind]
    pairs = [
        tuple([ms for pair in neighbours if pair[0]["run"] == run for ms in pair[side][clock]] for side in (0, 1))
        for run in sorted({a["run"] for a, _ in neighbours})
    ]
    p50 = sorted(median(b) / median(a) for a, b in pairs)
    p99 = sorted(percentile(b) / percentile(a) for a, b in pairs)
    found = {
        "p50_ms": median(median(b) for _, b in pairs), "p50_ratio": median(p50), "p50_least": p50[0], "p50_most": p50[-1],
        "p99_ms": median(percentile(b) for _, b in pairs), "p99_ratio": median(p99), "p99_least": p99[0], "p99_most": p99[-1],
    }  # fmt: skip
    steps = [min(len(pair[side]) for pair in pairs) for side in (0, 1)]
    return {"beside idle": kind, "clock": clock, "runs": len(pairs), "idle_steps": steps[0], "steps": steps[1]} | {
        name: round(value, 3) for name, value in found.items()
    }


def percentile(values: list[float]) -> float:
    """The 99th; of fewer than 100 the largest."""
    return sorted(values)[min(len(values) - 1, int(0.99 * len(values)))]


if __name__ == "__main__":
    sys.exit(main())

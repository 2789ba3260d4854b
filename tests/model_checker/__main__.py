"""Drawn lives of caches against the loop reference, for hours.

    python -m tests.model_checker --hours 2 --seed 7 --json FILE

Every batch is 50 lives of up to 40 operations on 1, 2 or 4 simulated ranks, drawn from the seed and the number of the batch. The first that
breaks an invariant is shrunk, printed as the calls that lead to it, and ends the run with exit status 1. Ctrl-C ends it with what was done.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from pikv_ds.launch.output import print_table, write_json

from .machine import DONE, CacheModel

LIVES, OPERATIONS = 50, 40


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.model_checker", description="Drawn lives of caches against the loop reference.")
    parser.add_argument("--hours", type=float, default=0.1, help="how long (default 0.1); a batch that has begun is ended")
    parser.add_argument("--seed", type=int, default=0, help="of the first batch (default 0); every batch takes the next one")
    parser.add_argument("--json", metavar="FILE", help="write how often every operation was done")
    args = parser.parse_args()
    torch.set_num_threads(1)
    began, cpu, batches, failed = time.monotonic(), time.process_time(), 0, ""
    try:
        while not failed and time.monotonic() - began < 3600 * args.hours:
            failed = batch(args.seed + batches)
            batches += 1
            print(f"seed {args.seed + batches - 1}: {sum(DONE.values())} operations, {time.monotonic() - began:.0f} s", flush=True)
    except KeyboardInterrupt:
        print(f"stopped in batch {batches}")
    rows = [{"operation": name, "done": count} for name, count in sorted(DONE.items())]
    print_table(f"{batches} batches of {LIVES} lives, seeds from {args.seed}", rows)
    about = {"seed": args.seed, "batches": batches, "lives": LIVES * batches, "cpu_s": time.process_time() - cpu, "failed": failed}
    write_json(args.json, "tests.model_checker", [about, *rows])
    return int(bool(failed))


def batch(number: int) -> str:
    """What went wrong, "" = nothing."""
    own = settings(
        max_examples=LIVES, stateful_step_count=OPERATIONS, deadline=None, database=None, print_blob=False, report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink), suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    try:
        run_state_machine_as_test(seed(number)(CacheModel), settings=own)
    except Exception as error:  # noqa: BLE001 - whatever a cache raises is what was looked for
        notes = "\n".join(getattr(error, "__notes__", ()))
        print(f"seed {number}: {type(error).__name__}: {error}\n{notes}", flush=True)
        return f"seed {number}: {type(error).__name__}: {error}\n{notes}"[:4000]
    return ""


if __name__ == "__main__":
    sys.exit(main())

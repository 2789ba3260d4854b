"""The matrix of tests/ops/matrix.py from the command line.

    python -m tests.ops.run_matrix emu --long          the CUDA kernels on the host, threads and blocks in order and in reverse
    python -m tests.ops.run_matrix cpu                 every instruction set of this CPU
    python -m tests.ops.run_matrix cuda --long         on a device; also under compute-sanitizer
    python -m tests.ops.sanitize                       cpu, built with AddressSanitizer and UndefinedBehaviorSanitizer

Prints the largest error of each op and format; --json FILE writes them. Stops at the first point that fails, or with --keep-going counts
those that fail and prints the first of them; the exit status is 1 then. A part of the matrix: --op NAME, --points N, --shard I/N.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator

import torch

from pikv_ds.launch.output import print_table, write_json
from pikv_ds.ops import library
from pikv_ds.ops.build import load
from pikv_ds.ops.build.compile import build, cpu_library
from tests.ops.matrix import Point, block_points, cpu_points, points, tensor_points

IMPLEMENTATIONS = ("torch", "cpu", "emu", "cuda", "nvrtc")
CPU_LIBRARY = "PIKV_TEST_LIBRARY"  # path of the library to run instead of the usual one


def settings(implementation: str) -> Iterator[tuple[str, Callable]]:
    """Loads the implementation; each way to run it: label, and name -> op. Raises BuildError."""
    ours = lambda name: getattr(torch.ops.pikv, name)  # noqa: E731
    if implementation == "torch":
        yield "torch", library.REFERENCE.__getitem__
    elif implementation == "cpu":
        path = os.environ.get(CPU_LIBRARY) or str(build(cpu_library()))
        torch.ops.load_library(path)
        for name, runs in load.cpu_kernels(path).items():
            if runs:
                os.environ["PIKV_KERNEL"] = name
                yield name, ours
    elif implementation == "emu":
        load.define_emu()
        for reverse in (False, True):
            load.emu_in_reverse(reverse)
            yield "emu in reverse" if reverse else "emu", lambda name: getattr(torch.ops.pikv_emu, name)
    else:
        load.BACKENDS[implementation].load()
        yield implementation, ours


SHOWN = 5  # of the points that failed


def chosen(
    long: bool, op: str | None = None, count: int | None = None, shard: tuple[int, int] = (1, 1), own: tuple[Point, ...] = ()
) -> list[Point]:
    """The points of one op or of all; `count` of them spread evenly; of these every n-th from the i-th on, for shard (i, n)."""
    found = [point for point in (*points(long), *tensor_points(long), *own) if op in (None, point.op)]
    if count is not None and count < len(found):
        found = [found[i * len(found) // count] for i in range(count)]
    return found[shard[0] - 1 :: shard[1]]


def run(implementation: str, given: list[Point], keep_going: bool = False) -> list[dict[str, object]]:
    """A row per way to run it, op and format. Raises what a point raises, unless it keeps going."""
    device = "cuda" if implementation in ("cuda", "nvrtc") else "cpu"
    rows: dict[tuple[str, ...], dict[str, object]] = {}
    for label, op in settings(implementation):
        for point in given:
            started, error, failure = time.monotonic(), 0.0, ""
            try:
                error = point.check(op, device)
            except (AssertionError, RuntimeError) as wrong:
                if not keep_going:
                    raise
                failure = f"{point.id}: {str(wrong).strip().splitlines()[0]}"
            family = point.id.split("-")[0] if point.op in ("decode", "prefill_cached", "append", "page_bounds") else ""
            row = rows.setdefault((label, point.op, family), {
                "implementation": label, "op": point.op, "format": family, "points": 0, "failed": 0, "largest_error": 0.0, "seconds": 0.0,
                "failures": [],
            })  # fmt: skip
            row["points"] += 1
            if failure:
                row["failed"] += 1
                row["failures"] = [*row["failures"], failure][:SHOWN]
            row["largest_error"] = max(row["largest_error"], float(f"{error:.2g}"))
            row["seconds"] = round(row["seconds"] + time.monotonic() - started, 2)
    return list(rows.values())


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.ops.run_matrix")
    parser.add_argument("implementation", choices=IMPLEMENTATIONS)
    parser.add_argument("--long", action="store_true", help="also widths, page sizes, query dtypes, shards and splits")
    parser.add_argument("--op", choices=(*library.SCHEMAS, *library.CPU_SCHEMAS), help="one op only")
    parser.add_argument("--points", type=int, metavar="N", help="N of the points, spread over the matrix")
    parser.add_argument("--shard", type=_shard, default=(1, 1), metavar="I/N", help="every N-th point, from the I-th on (1/N to N/N)")
    parser.add_argument("--keep-going", action="store_true", help="count the points that fail instead of stopping at the first")
    parser.add_argument("--json", metavar="FILE", help="write the rows to FILE")
    args = parser.parse_args(argv)
    own = (*block_points(args.long), *(cpu_points() if args.implementation in ("torch", "cpu") else ()))
    rows = run(args.implementation, chosen(args.long, args.op, args.points, args.shard, own), args.keep_going)
    failures = [failure for row in rows for failure in row["failures"]]
    print_table("Matrix of the ops", [{name: value for name, value in row.items() if name != "failures"} for row in rows])
    write_json(args.json, f"run_matrix {args.implementation}{' --long' if args.long else ''}", rows)
    for failure in failures[:SHOWN]:
        print(f"failed: {failure}")
    failed, total = (sum(row[name] for row in rows) for name in ("failed", "points"))
    print(f"{total} points, {failed} failed, largest error {max(row['largest_error'] for row in rows):.2g}")
    return 1 if failed else 0


def _shard(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r}: I/N with 1 <= I <= N, for example 3/12")
    return int(number), int(count)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

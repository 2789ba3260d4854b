"""The matrix of tests/ops/matrix.py from the command line.

    python -m tests.ops.run_matrix emu --long          the CUDA kernels on the host, threads and blocks in order and in reverse
    python -m tests.ops.run_matrix cpu                 every instruction set of this CPU
    python -m tests.ops.run_matrix cuda --long         on a device; also under compute-sanitizer
    python -m tests.ops.run_matrix cpu --sanitize      built with AddressSanitizer and UndefinedBehaviorSanitizer

Prints the largest error of each op and format; --json FILE writes them. Stops at the first point that fails.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

import torch

from pikv_ds.launch.output import print_table, write_json
from pikv_ds.ops import library, load
from tests.ops.matrix import points

IMPLEMENTATIONS = ("torch", "cpu", "emu", "cuda", "nvrtc")


def ops_of(implementation: str):
    """name -> op; builds and loads what is needed. Raises BuildError."""
    if implementation == "torch":
        return library.REFERENCE.__getitem__
    if implementation == "emu":
        load.define_emu()
        return lambda name: getattr(torch.ops.pikv_emu, name)
    load.BACKENDS[implementation].load()
    return lambda name: getattr(torch.ops.pikv, name)


def settings_of(implementation: str) -> dict[str, dict[str, str]]:
    """What an implementation is run under: label -> environment."""
    if implementation != "cpu":
        return {implementation: {}}
    sets = ("baseline", "avx2", "avx512", "vnni")
    return {name: {"PIKV_CPU": name} for name in sets[: sets.index(load.cpu_instruction_set()) + 1]}


def run(implementation: str, long: bool) -> list[dict[str, object]]:
    op, device = ops_of(implementation), "cuda" if implementation in ("cuda", "nvrtc") else "cpu"
    rows: dict[tuple[str, ...], dict[str, object]] = {}
    for label, environment in settings_of(implementation).items():
        os.environ.update(environment)
        for point in points(long):
            if implementation == "emu":
                load.emu_in_reverse(False)
            started = time.monotonic()
            error = point.check(op, device)
            if implementation == "emu":
                load.emu_in_reverse(True)
                error = max(error, point.check(op, device))
            family = point.id.split("-")[0] if point.op in ("decode", "prefill_cached", "append") else ""
            row = rows.setdefault((label, point.op, family), {
                "implementation": label, "op": point.op, "format": family, "points": 0, "largest_error": 0.0, "seconds": 0.0,
            })  # fmt: skip
            row["points"] += 1
            row["largest_error"] = max(row["largest_error"], float(f"{error:.2g}"))
            row["seconds"] = round(row["seconds"] + time.monotonic() - started, 2)
    return list(rows.values())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.ops.run_matrix")
    parser.add_argument("implementation", choices=IMPLEMENTATIONS)
    parser.add_argument("--long", action="store_true", help="also widths, page sizes, query dtypes, shards and splits")
    parser.add_argument("--json", metavar="FILE", help="write the rows to FILE")
    args = parser.parse_args(argv)
    rows = run(args.implementation, args.long)
    print_table("Matrix of the ops", rows)
    write_json(args.json, f"run_matrix {' '.join(argv or sys.argv[1:])}", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

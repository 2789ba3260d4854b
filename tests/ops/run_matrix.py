"""The matrix of tests/ops/matrix.py from the command line.

    python -m tests.ops.run_matrix emu --long          the CUDA kernels on the host, threads and blocks in order and in reverse
    python -m tests.ops.run_matrix cpu                 every instruction set of this CPU
    python -m tests.ops.run_matrix cuda --long         on a device; also under compute-sanitizer
    python -m tests.ops.sanitize                       cpu, built with AddressSanitizer and UndefinedBehaviorSanitizer

Prints the largest error of each op and format; --json FILE writes them. Stops at the first point that fails.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
import time
from collections.abc import Callable, Iterator

import torch

from pikv_ds.launch.output import print_table, write_json
from pikv_ds.ops import library
from pikv_ds.ops.build import load
from pikv_ds.ops.build.compile import build, cpu_library
from tests.ops.matrix import points, tensor_points

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
        best = ctypes.CDLL(path).pikv_cpu_instruction_set
        best.restype = ctypes.c_char_p
        sets = ("baseline", "avx2", "avx512", "vnni")
        for name in sets[: sets.index(best().decode()) + 1]:
            os.environ["PIKV_CPU"] = name
            yield name, ours
    elif implementation == "emu":
        load.define_emu()
        for reverse in (False, True):
            load.emu_in_reverse(reverse)
            yield "emu in reverse" if reverse else "emu", lambda name: getattr(torch.ops.pikv_emu, name)
    else:
        load.BACKENDS[implementation].load()
        yield implementation, ours


def run(implementation: str, long: bool) -> list[dict[str, object]]:
    device = "cuda" if implementation in ("cuda", "nvrtc") else "cpu"
    rows: dict[tuple[str, ...], dict[str, object]] = {}
    for label, op in settings(implementation):
        for point in (*points(long), *tensor_points(long)):
            started = time.monotonic()
            error = point.check(op, device)
            family = point.id.split("-")[0] if point.op in ("decode", "prefill_cached", "append", "page_bounds") else ""
            row = rows.setdefault((label, point.op, family), {
                "implementation": label, "op": point.op, "format": family, "points": 0, "largest_error": 0.0, "seconds": 0.0,
            })  # fmt: skip
            row["points"] += 1
            row["largest_error"] = max(row["largest_error"], float(f"{error:.2g}"))
            row["seconds"] = round(row["seconds"] + time.monotonic() - started, 2)
    return list(rows.values())


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.ops.run_matrix")
    parser.add_argument("implementation", choices=IMPLEMENTATIONS)
    parser.add_argument("--long", action="store_true", help="also widths, page sizes, query dtypes, shards and splits")
    parser.add_argument("--json", metavar="FILE", help="write the rows to FILE")
    args = parser.parse_args(argv)
    rows = run(args.implementation, args.long)
    print_table("Matrix of the ops", rows)
    write_json(args.json, f"run_matrix {args.implementation}{' --long' if args.long else ''}", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""`pikv build`: compile the ops now and check them."""

from __future__ import annotations

import argparse

from pikv_ds.launch.output import print_table, write_json

TARGETS = ("cpu", "cuda", "nvrtc", "emu")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("build", help="compile the ops and check them")
    parser.add_argument(
        "target",
        nargs="?",
        default="cpu",
        choices=(*TARGETS, "all"),
        help="cpu (default); cuda: nvcc, registers and spills within limits; nvrtc: the same kernels without nvcc; emu: the CUDA kernels "
        "on the host, slow; cpu and emu are checked against the torch reference. all: what is not possible here is skipped",
    )


def run(args: argparse.Namespace) -> int:
    from ._build_targets import build_target, kernel_digest, kernel_table

    rows, kernels = [], []
    for name in TARGETS if args.target == "all" else (args.target,):
        row, uses = build_target(name)
        if row["status"] == "missing" and args.target == "all" and name != "cpu":
            row["status"] = "skipped"
        rows.append(row)
        kernels += [{"target": name, **use.row()} for use in uses]
        if uses:
            print_table(f"Kernels of {name}: registers and bytes spilled", kernel_table(uses))
    print_table("Ops", rows)
    write_json(args.json, f"build {args.target}", rows + kernels, sources=[{"target": "cuda", "digest": kernel_digest()}])
    print("; ".join(f"{row['target']} {row['status']}: {row['detail'] or 'error ' + str(row['largest error'])}" for row in rows))
    return 0 if all(row["status"] in ("ok", "skipped") for row in rows) else 1

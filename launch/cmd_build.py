"""`pikv build`: compile the ops now, load them, and check them against the torch reference."""

from __future__ import annotations

import argparse
import time
from typing import Any

from pikv_ds.launch.output import print_table, write_json

TARGETS = ("cpu",)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("build", help="compile the ops and check them against the torch reference")
    parser.add_argument("target", nargs="?", default="cpu", choices=(*TARGETS, "all"), help="what to build (default: cpu)")


def run(args: argparse.Namespace) -> int:
    rows = [_TARGET[name]() for name in (TARGETS if args.target == "all" else (args.target,))]
    print_table("Ops", rows)
    write_json(args.json, "build", rows)
    return 0 if all(row["status"] == "ok" for row in rows) else 1


def _cpu() -> dict[str, Any]:
    from pikv_ds.ops.compile import BuildError, build, cpu_library

    library = cpu_library()
    started = time.monotonic()
    row = {"target": "cpu", "status": "ok", "seconds": 0.0, "compiler": library.compiler, "largest error": None, "detail": ""}
    try:
        path = build(library)
        row["seconds"] = round(time.monotonic() - started, 1)
        row["detail"] = path.name
        worst = _largest_error(path)
    except BuildError as error:
        return row | {"status": "failed", "detail": str(error)}
    row["largest error"] = float(f"{worst:.2g}")
    return row if worst < 1e-4 else row | {"status": "wrong results"}


_TARGET = {"cpu": _cpu}


def _largest_error(path) -> float:
    """Largest relative error of decode over the formats, the library against the reference in f64 on the same pages."""
    import torch

    from pikv_ds import ops
    from pikv_ds.ops import ref_attend, ref_formats
    from pikv_ds.ops.formats import FORMATS

    torch.ops.load_library(str(path))
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for name in FORMATS:
        fmt = ops.PageFormat(name, 2, 64, 64, 64)
        pages = ops.new_pages(fmt, 4)
        k, v = (torch.randn(4, 2, 64, 64, generator=generator) for _ in "kv")
        ref_formats.encode_pages(pages, fmt, torch.arange(4), k, v)
        q = torch.randn(1, 8, 64, generator=generator).bfloat16()
        table = torch.tensor([[[2, 0, 3]]], dtype=torch.int32)
        lens = torch.tensor([[192 if fmt.grouped else 150]], dtype=torch.int32)
        extra = {"tail": torch.zeros(1, 2, 64, 64), "tail_rows": torch.zeros(1, dtype=torch.int32)} if fmt.grouped else {}
        out, _, _ = ops.decode(q, pages, fmt, table, lens, scale=0.125, **extra)
        expected, _, _ = ref_attend.attend(q.double().unsqueeze(1), pages, fmt, table, lens, scale=0.125, **extra)
        worst = max(worst, ((out - expected.squeeze(1)).norm() / expected.norm()).item())
    return worst

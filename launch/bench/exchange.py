"""`pikv bench exchange`: a decode step of distinct requests on several ranks of this machine, by each way of routing.exchange.

The ways run in turns on the same random tokens, and their outputs are compared bit for bit. What leaves a rank is read off the calls into
torch.distributed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from pikv_ds.launch.output import print_table, write_json
from pikv_ds.launch.ranks import run_ranks

CASES = {
    "experts": {"method": "experts", "sink_tokens": 0, "recent_tokens": 1},
    "topk 1 of 4": {"method": "topk", "sink_tokens": 0, "recent_tokens": 0},
    "topk 1 of 4, 4 sinks and 16 recent": {"method": "topk", "sink_tokens": 4, "recent_tokens": 16},
    "bounds, 1 page": {"method": "bounds", "budget_pages": 1, "sink_tokens": 0, "recent_tokens": 1},
    "bounds 1/16": {"method": "bounds", "budget_ratio": 0.0625, "sink_tokens": 0, "recent_tokens": 1},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], metavar="G", help="ranks of this machine (default 2 4)")
    parser.add_argument("--rows", type=int, default=8, metavar="B", help="requests of each rank (default 8)")
    parser.add_argument("--context", type=int, default=1024, metavar="N", help="tokens of each request (default 1024)")
    parser.add_argument("--layers", type=int, default=2, metavar="L", help="layers of a step (default 2)")
    parser.add_argument("--steps", type=int, default=30, metavar="N", help="timed steps of each way, in turns (default 30)")


def run(args: argparse.Namespace) -> int:
    rows = []
    options = {"rows": args.rows, "context": args.context, "layers": args.layers, "steps": args.steps, "cases": CASES}
    for ranks in args.ranks:
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "rows.json"
            run_ranks("pikv_ds.launch.jobs.exchange", [json.dumps(options), str(result)], ranks)
            rows += [row | {key: options[key] for key in ("rows", "context", "layers", "steps")} for row in json.loads(result.read_text())]
    shown = ("ranks", "case", "exchange", "read_share", "bytes", "query_bytes", "partial_bytes", "news_bytes", "query_and_partial_share",
             "collectives", "ms", "cpu_ms")  # fmt: skip
    print_table(
        f"Step of {args.layers} layers, {args.rows} requests per rank, 32 query heads, 8 kv heads of 128, bf16, one thread per rank",
        [{key: float(f"{row[key]:.4g}") if isinstance(row[key], float) else row[key] for key in shown} for row in rows],
    )
    write_json(args.json, "bench exchange", rows)
    return 0

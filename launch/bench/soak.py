"""`pikv bench soak`: random requests and sessions for a while on several ranks of this machine, while shards move and pages change pools.

Two models, one exact, the other with int8 pages behind a raw window, each with sessions that are begun, continued, forked, rewound, saved,
loaded and freed. Counted are requests, entries that no counter accounts for, answers that differ from an ordinary cache's, resident
memory and the time of decode steps.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from pikv_ds.launch.output import print_table, write_json
from pikv_ds.launch.ranks import run_ranks

SHOWN = (
    "ranks", "seconds", "requests", "entries_appended", "entries_lost", "wrong_answers", "moves", "rss_start", "rss_end", "rss_growth",
    "step_ms_p50", "step_ms_p99", "step_ms_p99_migrating",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=60, metavar="N", help="how long (default 60)")
    parser.add_argument("--ranks", type=int, default=4, metavar="R", help="ranks of this machine (default 4)")
    parser.add_argument("--sessions", type=int, default=5, metavar="N", help="that live at once in each model (default 5)")
    parser.add_argument("--tokens", type=int, default=160, metavar="N", help="after which a session is freed (default 160)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of what is asked (default 0)")


def run(args: argparse.Namespace) -> int:
    options = {name: getattr(args, name) for name in ("seconds", "ranks", "sessions", "tokens", "seed")}
    with tempfile.TemporaryDirectory(prefix="pikv_soak_") as folder:
        result = Path(folder) / "rows.json"
        run_ranks("pikv_ds.launch.jobs.soak", [json.dumps(options), folder, str(result)], args.ranks)
        row = options | json.loads(result.read_text(encoding="utf-8"))
    print_table("Soak", [{name: float(f"{row[name]:.4g}") if isinstance(row[name], float) else row[name] for name in SHOWN}])
    write_json(args.json, "bench soak", [row])
    return 1 if row["entries_lost"] or row["wrong_answers"] else 0

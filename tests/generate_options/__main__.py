"""python -m tests.generate_options --table | --random N [--ranks 1,2] [--json FILE]: the long form, with its results written down.

--table writes docs/results/generate_options.json; then `python -m tests.docs generate`. --random runs cases 0 .. N - 1, shared out over the
numbers of ranks; with --json it goes on where FILE ends. Exit status 1 when one is wrong or hangs.
"""

import argparse
import sys
from pathlib import Path

from .random_results import run_random
from .table_results import FILE, run_table, written


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.generate_options", description="Options of generate(), attached beside plain.")
    parser.add_argument("--table", action="store_true", help="every try of the table; writes its results")
    parser.add_argument("--random", type=int, metavar="N", help="cases composed at random")
    parser.add_argument("--ranks", default="1,2", help="numbers of ranks, default 1,2")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where results of --random are kept")
    args = parser.parse_args()
    bad = 0
    if args.table:
        found = run_table()
        FILE.write_text(written(found), encoding="utf-8")
        bad += sum(one["status"] not in ("served", "tie", "refused", "same error") for one in found.values())
    if args.random:
        bad += run_random(args.random, [int(ranks) for ranks in args.ranks.split(",")], args.json)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

"""Write what a distributed test job measured: python -m tests.dist.results bundled.py --ranks 2 --json FILE"""

import argparse
import sys

from pikv_ds.launch.output import write_json
from tests.dist.launcher import run_gloo


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job")
    parser.add_argument("arguments", nargs="*", help="of the job")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--json", required=True)
    args = parser.parse_args()
    result = run_gloo(args.job, args.arguments, ranks=args.ranks, timeout_s=600)
    write_json(args.json, f"tests.dist.results {' '.join([args.job, *args.arguments])} --ranks {args.ranks}", result.rows)
    failed = [row for row in result.rows if not row["ok"]]
    print(f"{len(result.rows)} rows, {len(failed)} failed, {result.wall_s:.0f} s")
    return 1 if failed or result.returncode else 0


if __name__ == "__main__":
    sys.exit(main())

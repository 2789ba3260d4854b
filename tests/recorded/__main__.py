"""Record what the cases of cases.py give, or compare with what was recorded.

    python -m tests.recorded                      # every case against tests/recorded/outcomes.json; exit status 1 on a difference
    python -m tests.recorded --only w2 --json     # cases whose name has "w2" in it; rows of JSON in place of a table
    python -m tests.recorded --write FILE         # record; with --only the other cases of FILE stay as they are

Bits depend on the CPU, on torch and on the kernels. On another machine than the recorded one digests are not compared, samples within
the tolerance of their case, and counts exactly but for the groups that a case names in by_score; the output says so. To compare bits
there, record the base there: check out the commit that added this folder (all the rest of its tree is the base), run --write FILE on
that machine, then come back and run with --against FILE.

An outcome that is meant to change is recorded again in the commit that changes it: --only NAME --write tests/recorded/outcomes.json.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.recorded import book
from tests.recorded.cases import CASES, Case
from tests.recorded.compare import differences
from tests.recorded.runner import record


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.recorded", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="record instead of comparing")
    parser.add_argument("--against", type=Path, default=book.PATH, metavar="FILE", help="what is compared with")
    parser.add_argument("--only", action="append", metavar="NAME", help="cases with this in their name; may be given several times")
    parser.add_argument("--json", action="store_true", help="rows of JSON on stdout in place of a table")
    args = parser.parse_args()
    cases = [case for case in CASES.values() if not args.only or any(part in case.name for part in args.only)]
    if not cases:
        parser.error(f"--only {' '.join(args.only)}: no case has this in its name")
    started = time.monotonic()
    outcomes, seconds = record(cases)
    wall = time.monotonic() - started
    return _write(args.write, cases, outcomes, bool(args.only)) if args.write else _compare(args, cases, outcomes, seconds, wall)


def _write(path: Path, cases: list[Case], outcomes: dict[str, list[dict]], partial: bool) -> int:
    about = book.machine()
    bad = [line for case in cases for line in _unfit(case, outcomes[case.name])]
    earlier = book.read(path) if partial and path.exists() else {"machine": about, "cases": {}}
    if earlier["machine"] != about:
        bad.append(f"{path} was recorded on {earlier['machine']}, this is {about}: record all cases")
    if bad:
        print("\n".join(bad), file=sys.stderr)
        return 1
    known = earlier["cases"] | {case.name: outcomes[case.name] for case in cases if case.refused is None}
    book.write(path, about, {name: known[name] for name in CASES if name in known})
    print(f"{len(cases)} cases recorded in {path}")
    return 0


def _unfit(case: Case, found: list[dict]) -> list[str]:
    """What may not be recorded: errors, and refusals that the case does not expect."""
    lines = differences(case, found, None if case.refused else found, same_machine=True)
    return [f"{case.name}: {line}" for line in lines]


def _compare(args, cases: list[Case], outcomes: dict, seconds: dict[str, float], wall: float) -> int:
    recorded, about = book.read(args.against), book.machine()
    same = recorded["machine"] == about
    rows = [
        {
            "case": case.name,
            "ranks": case.world,
            "seconds": seconds.get(case.name),
            "differs": differences(case, outcomes[case.name], recorded["cases"].get(case.name), same),
            "deleted": case.deleted,
        }
        for case in cases
    ]
    if args.json:
        print(json.dumps({"same_machine": same, "machine": about, "recorded_on": recorded["machine"], "rows": rows}, indent=1))
    else:
        _print(rows, same, about, recorded["machine"], wall)
    return 1 if any(row["differs"] for row in rows) else 0


def _print(rows: list[dict], same: bool, about: dict, recorded: dict, wall: float) -> None:
    table = Table("case", "seconds", "", "what differs")
    for row in rows:
        verdict = "[red]differs[/red]" if row["differs"] else "[green]equal[/green]"
        notes = row["differs"] + ([f"to be deleted: {row['deleted']}"] if row["deleted"] else [])
        table.add_row(row["case"], "" if row["seconds"] is None else f"{row['seconds']:.1f}", verdict, "\n".join(notes))
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    if not same:
        other = {name: f"{recorded.get(name)} -> {value}" for name, value in about.items() if recorded.get(name) != value}
        console.print(f"Recorded on another machine, {other}: bits are not compared, samples within a tolerance; see python -m ... --help")
    differ = sum(bool(row["differs"]) for row in rows)
    console.print(f"{len(rows)} cases, {differ} differ, {wall:.0f} s")


if __name__ == "__main__":
    sys.exit(main())

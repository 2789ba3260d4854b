"""Bugs planted one at a time: does a test fail?

    python -m tests.mutants --json docs/results/mutants.json    all; rows of earlier runs of the same mutants are kept
    python -m tests.mutants --only shard_map --json rows.json        those whose name holds a word
    python -m tests.mutants --list

Every mutant is one edit (planted/, operators.py) of one source, in memory. It meets the narrow tests of its file, then the short form
of the model checker, each within 60 s of CPU time. "killed": a test fails. A survivor is a gap or an equivalent: survivors.py says which.
Ctrl-C ends it with the rows so far. Exit 1: a survivor that survivors.py does not explain, or tests that fail without a mutant.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from . import child
from .mutant import ROOT, Mutant
from .planted import mutants
from .survivors import WHY

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description="Bugs planted one at a time: does a test fail?")
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="mutants whose name holds one of them")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="every N-th mutant, from the I-th on: for several processes")
    parser.add_argument("--json", metavar="FILE", help="rows; a file that is there is continued")
    parser.add_argument("--rows", nargs="*", default=[], metavar="FILE", help="take over the rows of these files as well")
    parser.add_argument("--hours", type=float, default=24.0, help="stop before the first mutant after so long")
    parser.add_argument("--narrow", action="store_true", help="without the model checker: what survives says only that narrow tests pass")
    parser.add_argument("--again", action="store_true", help="run what survived once more")
    parser.add_argument("--list", action="store_true", help="print names and edits, run nothing")
    args = parser.parse_args()
    os.chdir(ROOT)
    part, parts = map(int, args.part.split("/"))
    chosen = [each for each in mutants() if any(word in each.name for word in args.only)][part - 1 :: parts]
    if args.list:
        print("\n".join(f"{each.name}: {each.what}" for each in chosen))
        print(f"{len(chosen)} mutants")
        return 0
    rows = {name: row for file in (*args.rows, args.json) for name, row in read(file).items()}
    rows = {each.name: rows[each.name] for each in chosen if rows.get(each.name, {}).get("edit") == edit_of(each)}
    if args.again:
        rows = {name: row for name, row in rows.items() if row["outcome"] != child.SURVIVED}
    failed = run_all(chosen, rows, args)
    return report(rows, len(chosen)) or failed


def read(path: str | None) -> dict[str, dict[str, Any]]:
    if path is None or not Path(path).is_file():
        return {}
    return {row["mutant"]: row for row in json.loads(Path(path).read_text())["rows"]}


def edit_of(mutant: Mutant) -> str:
    """Another one when the source or the edit is another."""
    return blake2b(f"{mutant.place.file}\n{mutant.text}".encode(), digest_size=6).hexdigest()


def run_all(chosen: list[Mutant], rows: dict[str, dict[str, Any]], args: argparse.Namespace) -> int:
    """Fills rows. Returns 1 when tests fail without a mutant."""
    import torch

    torch.set_num_threads(1)
    child.warm(
        sorted(
            {
                file
                for mutant in chosen
                if mutant.name not in rows
                for tests in mutant.place.stages[: 1 if args.narrow else 2]
                for file in tests
            }
        )
    )
    began, healthy = time.monotonic(), set()
    with tempfile.TemporaryDirectory(prefix="pikv_mutants_") as folder:
        log = Path(folder) / "log"
        try:
            for mutant in chosen:
                if mutant.name in rows:
                    continue
                if time.monotonic() - began > 3600 * args.hours:
                    break
                stages = mutant.place.stages[:1] if args.narrow else mutant.place.stages
                rows[mutant.name] = one(mutant, stages, healthy, log)
                print(f"{len(rows)} of {len(chosen)}: {mutant.name}: {rows[mutant.name]['outcome']}", flush=True)
                write(args.json, rows)
        except SickTests as error:
            print(error)
            write(args.json, rows)
            return 1
        except KeyboardInterrupt:
            print(f"stopped after {len(rows)} of {len(chosen)}")
    write(args.json, rows)
    return 0


class SickTests(Exception):
    """Tests fail without a mutant."""


def one(mutant: Mutant, stages: Sequence[tuple[str, ...]], healthy: set[tuple[str, ...]], log: Path) -> dict[str, Any]:
    """healthy: stages that pass without a mutant, added to. Raises: SickTests."""
    spent, outcome, by = 0.0, child.SURVIVED, ""
    for tests in stages:
        if tests not in healthy:
            if child.run(None, tests, log)[0] != child.SURVIVED:
                raise SickTests(f"{' '.join(tests)} fail without a mutant:\n{log.read_text(errors='replace')[-3000:]}")
            healthy.add(tests)
        outcome, cpu = child.run(mutant, tests, log)
        spent += cpu
        if outcome != child.SURVIVED:
            text = log.read_text(errors="replace")
            failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.MULTILINE)
            by = failed[0] if failed else " ".join(tests)
            break
    row = {"mutant": mutant.name, "file": mutant.place.file, "what": mutant.what, "outcome": outcome, "by": by, "cpu_s": round(spent, 1)}
    row |= {"model_checker": stages == mutant.place.stages}
    return row | {"why": WHY.get(mutant.name, ""), "edit": edit_of(mutant)}


def write(path: str | None, rows: dict[str, dict[str, Any]]) -> None:
    from pikv_ds.launch.output import write_json

    write_json(path, "tests.mutants", [row | {"why": WHY.get(name, "")} for name, row in rows.items()])


def report(rows: dict[str, dict[str, Any]], planned: int) -> int:
    outcomes = Counter(row["outcome"] for row in rows.values())
    alive = [row for row in rows.values() if row["outcome"] == child.SURVIVED]
    unlike = [row for row in alive if not WHY.get(row["mutant"], "").startswith("equivalent")]
    print(f"{len(rows)} of {planned} mutants: " + ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common()))
    for row in alive:
        print(f"survived: {row['mutant']}: {row['what']}: {WHY.get(row['mutant'], 'not explained')}")
    different = len(rows) - (len(alive) - len(unlike))
    if different:
        dead = different - len(unlike)
        print(f"of {different} that are not equivalent {dead} are killed: {100 * dead / different:.1f} %")
    return int(any(row["mutant"] not in WHY for row in alive))


if __name__ == "__main__":
    sys.exit(main())

"""The bench gate: are decode steps of this tree slower than those of a base commit?

    python -m tests.gate                    three configurations, 61 pairs each, against the commit in trees.BASE
    python -m tests.gate --base HEAD        what the uncommitted changes cost
    python -m tests.gate --only routed --json rows.json

The base is checked out with `git worktree` into a temporary folder, which is removed afterwards. A side is a process, or a process per
rank, that imports pikv_ds from its own tree, builds the same model or cache (decodes.py) and waits. The gate lets the sides take short
turns, in a drawn order and then in its reverse. A pair is the ratio current / base of one such round, each side's time the mean of the
median step of its two turns. A configuration is judged by the median of its pairs and the bootstrap interval of that median.

A third side runs in the same rounds: the base once more, in processes of its own. Its ratio to the base, A/A, is what the gate says when
nothing has changed. Two processes of one tree differ by about one percent for as long as they live, by where their memory lies; so a run
starts them three times. An A/A that stays away from 1 says that the machine is too busy.

The gate fails (exit 1) when the whole 95 % interval of the ratio lies above 1.02, in two runs: a first such run is followed by a second,
with new processes. Exit 2: it could not run.

CPU time is shown beside, of the mean step, all threads and ranks: other work on the machine makes steps longer, and their CPU time less so.
`same output` compares outputs bit for bit, to see that both trees did the same work. Everything runs on the CPU, one thread per process.
About three minutes on two quiet cores.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from functools import partial
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from pikv_ds.launch.output import print_table, write_json
from tests.gate.decodes import DECODES
from tests.gate.rounds import Rounds, measure
from tests.gate.sides import WorkerFailed
from tests.gate.trees import BASE, ROOT, NoBase, checked_out, current, resolve
from tests.gate.verdict import LIMIT, judged

PAIRS, QUICK_PAIRS = 61, 15
STEPS = 12  # of one turn: short turns see less of what changes on the machine, and the two steps before each cost more


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m tests.gate", description="Decode steps of this tree against those of a base commit.")
    made.add_argument("--base", default=BASE, metavar="REV", help=f"commit to compare with (default {BASE[:7]})")
    made.add_argument("--pairs", type=int, metavar="N", help=f"pairs of blocks of each configuration (default {PAIRS}; at least 2)")
    made.add_argument("--only", action="append", choices=DECODES, metavar="NAME", help=f"one of {', '.join(DECODES)}; may be repeated")
    made.add_argument("--quick", action="store_true", help=f"{QUICK_PAIRS} pairs: for a first look")
    made.add_argument("--json", metavar="FILE", help="write all pairs, with machine and versions")
    return made


def main(arguments: list[str] | None = None) -> int:
    made = parser()
    args = made.parse_args(arguments)
    pairs = args.pairs or (QUICK_PAIRS if args.quick else PAIRS)
    if pairs < 2:
        made.error(f"argument --pairs: at least 2, got {pairs}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that processes and the checkout are removed then too
    try:
        rows = compare(args.only or list(DECODES), resolve(args.base), pairs)
    except (NoBase, WorkerFailed) as error:
        print(f"gate: {error}", file=sys.stderr)
        return 2
    report(rows)
    write_json(args.json, "tests.gate", rows)
    return int(any(row["verdict"] == "FAILED" for row in rows))


def compare(names: list[str], base: str, pairs: int) -> list[dict[str, Any]]:
    """A row per configuration, two where the first run was slower."""
    rows: list[dict[str, Any]] = []
    revisions = {"base": base, "current": current()}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with checked_out(base) as tree, Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        for name in names:
            task = progress.add_task(name, total=pairs)
            trees = {"base": tree, "twin": tree, "current": ROOT}
            run = partial(measure, name, trees, pairs=pairs, steps=STEPS, after_round=partial(_advance, progress, task, pairs))
            settings = {"name": name, "what": DECODES[name].what, "ranks": DECODES[name].ranks, "pairs": pairs, "steps": STEPS}
            for rounds, verdict in judged(run, lambda rounds: rounds.interval("current")):
                load = {"load_average": os.getloadavg()[0]}
                rows.append(settings | revisions | load | figures(rounds) | {"limit": LIMIT, "verdict": verdict})
    return rows


def _advance(progress: Progress, task: TaskID, pairs: int) -> None:
    if progress.tasks[task].finished:  # a second run
        progress.update(task, total=2 * pairs)
    progress.advance(task)


def figures(rounds: Rounds) -> dict[str, Any]:
    """*_step_ms of the median round. wall, cpu and A/A: [median, low, high] and, as *_ratios, a number per pair in order."""
    row: dict[str, Any] = {f"{side}_step_ms": median(pair.wall_ms for pair in pairs) for side, pairs in rounds.pairs.items()}
    for side, prefix in (("current", ""), ("twin", "aa_")):
        row[f"{prefix}same_output"] = rounds.same_output(side)
        for clock in ("wall", "cpu"):
            row[f"{prefix}{clock}"] = list(rounds.interval(side, f"{clock}_ms"))
            row[f"{prefix}{clock}_ratios"] = rounds.ratios(side, f"{clock}_ms")
    return row


def report(rows: list[dict[str, Any]]) -> None:
    title = f"{rows[0]['current'][:7]} against {rows[0]['base'][:7]}: current / base [95 %], limit {LIMIT}"
    shown = [
        {
            "decode": row["name"],
            "base ms": f"{row['base_step_ms']:.3f}",
            "current ms": f"{row['current_step_ms']:.3f}",
            "wall": _interval(row["wall"]),
            "A/A wall": _interval(row["aa_wall"]),
            "CPU": _interval(row["cpu"]),
            "A/A CPU": _interval(row["aa_cpu"]),
            "same output": "yes" if row["same_output"] else "NO",
            "verdict": row["verdict"],
        }
        for row in rows
    ]
    print_table(title, shown)


def _interval(numbers: list[float]) -> str:
    return "{:.3f} [{:.3f} {:.3f}]".format(*numbers)


if __name__ == "__main__":
    sys.exit(main())

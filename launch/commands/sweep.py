"""`pikv sweep`: every registered method on one model, from a committed list of configurations, on several processes."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pikv_ds
from pikv_ds import launch

ROOT = Path(pikv_ds.__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"  # of the repository, not in a wheel
SWEEPS = Path(launch.__file__).parent / "sweeps"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("sweep", help="quality and bytes of all methods, with their controls (docs/results/methods.md)")
    parser.add_argument(
        "file", nargs="?", metavar="FILE", help="families of configurations, or the name of a list in launch/sweeps (default: methods)"
    )
    parser.add_argument("--only", metavar="LIST", help="comma-separated names of families, such as compression,routing (default: all)")
    parser.add_argument("--model", metavar="DIR", help="model folder of the runs that name none (default: the bundled model)")
    parser.add_argument("--quick", action="store_true", help="two entries of each family on short contexts: shows that it runs")
    parser.add_argument("--workers", type=int, metavar="N", help="processes of one thread each (default: one per core)")
    parser.add_argument(
        "--context", type=int, metavar="N", help="tokens per window and per prompt, in place of the list's (not of task bytes)"
    )
    add = "rows go into the file of --json as they come; those that it holds, from whatever machine, are not measured again"
    parser.add_argument("--add", action="store_true", help=add)
    parser.add_argument("--report", metavar="DIR", help="also write report.html and its figures to DIR")


def run(args: argparse.Namespace) -> int:
    from pikv_ds.errors import ConfigError
    from pikv_ds.launch.cli import build_parser
    from pikv_ds.launch.evaluation.grown import Grown, UntilDone
    from pikv_ds.launch.evaluation.partial import Partial
    from pikv_ds.launch.evaluation.report import check_matplotlib
    from pikv_ds.launch.evaluation.sweep import files_needed, items_of, read_sweep

    if args.report:
        check_matplotlib()
    if args.add and not args.json:
        raise ConfigError("--add without --json: rows are added to a file; name it with --json FILE")
    model = args.model and str(Path(args.model).resolve())
    document, only = read_sweep(sweep_file(args.file or "methods")), args.only.split(",") if args.only else None
    output = Path(args.json).resolve() if args.json else None
    # What the sweep makes lies beside --json, so that a sweep that was stopped finds it again.
    folder = output.with_name(output.name + ".made") if output else Path(tempfile.mkdtemp(prefix="pikv_sweep_"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        # Made files are named relative to their folder, so that rows hold no path of this machine.
        with contextlib.chdir(folder):
            partial = Partial(output.with_name(output.name + ".partial") if output else folder / "rows.json")
            store = Grown(output, _command(args), partial) if args.add else UntilDone(partial)
            made = make_files(files_needed(document, only, args.quick), folder, model)
            items = items_of(document, only, args.quick, build_parser().parse_args, made, model, args.context)
            refused = _measure(items, store, args.workers or len(os.sched_getaffinity(0)), folder)
            rows = store.rows_of([item for item in items if store.has(item)])
    finally:
        if output is None:
            shutil.rmtree(folder)
    for item, text in refused:
        print(f"pikv sweep: {item.family}/{item.label}, {item.unit.task}: {text}", file=sys.stderr)
    if refused and not args.add:
        return 1
    _finish(args, store, _command(args), rows)
    store.finish()
    shutil.rmtree(folder, ignore_errors=True)
    return 1 if refused else 0


def _command(args: argparse.Namespace) -> str:
    """As it is recorded: what decides the rows, without what does not (--workers, --json)."""
    words = ["pikv sweep", *([os.path.relpath(args.file) if sweep_file(args.file) == Path(args.file) else args.file] if args.file else [])]
    for name in ("only", "context"):
        words += [f"--{name}", str(getattr(args, name))] if getattr(args, name) else []
    words += ["--model", _named(args.model)] if args.model else []
    return " ".join(words + ["--quick"] * args.quick + ["--add"] * args.add)


def sweep_file(name: str) -> Path:
    """A file, or else a list that comes with the package."""
    named = SWEEPS / f"{name}.json"
    return named if named.is_file() and not Path(name).exists() else Path(name)


def _named(model: str) -> str:
    """A model folder as a recorded command names it: no path of this machine where another way says it."""
    from pikv_ds.launch.real_model import KINDS, VARIABLE, find

    made = {find(kind): kind for kind in KINDS}
    return f"${VARIABLE}/{made[Path(model)]}" if Path(model) in made else model


def _finish(args: argparse.Namespace, store: Any, command: str, rows: list[dict[str, Any]]) -> None:
    from pikv_ds.launch.evaluation.report import write_report
    from pikv_ds.launch.evaluation.sweep_table import families_of, table_of
    from pikv_ds.launch.output import document_of, print_table, write_json

    for family in families_of(rows):
        print_table(family, table_of(rows, family))
    if not args.add:
        write_json(args.json, command, rows)
    if args.report:
        print(f"report: {write_report(args.report, [document_of(command, rows)])}")


def make_files(commands: dict[str, list[str]], folder: Path, model: str | None = None) -> dict[str, str]:
    """Run the commands that make files which are not there yet; {file} in a command is the file's path, {model} that of the sweep's model,
    None = the bundled one. Returns names in `folder`."""
    from pikv_ds.bundled import model_path

    given = {"{model}": model or str(model_path())}
    programs = {"python": [sys.executable], "pikv": [sys.executable, "-m", "pikv_ds.launch.cli"]}
    for name, command in commands.items():
        if (folder / name).exists():
            continue
        print(f"making {name}: {' '.join(command)}", flush=True)
        words = [(given | {"{file}": str(folder / name)}).get(word, word) for word in command]
        done = subprocess.run([*programs[words[0]], *words[1:]], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise FileNotFoundError(f"{name} could not be made by {' '.join(command)}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return {name: name for name in commands}


def _measure(items: list, store: Any, workers: int, folder: Path) -> list[tuple[Any, str]]:
    """Bring every item's row into `store`; returns those that were refused, with the reason."""
    from pikv_ds.launch.evaluation.partial import key_of
    from pikv_ds.launch.evaluation.spec import TASKS
    from pikv_ds.launch.evaluation.workers import measure_all

    todo = list({key_of(item.spec, item.unit) + store.apart(item): item for item in items if not store.has(item)}.values())
    print(f"{len(items)} units, {len(items) - len(todo)} of them measured already or twice in the list", flush=True)
    # Text of all methods comes before the facts.
    order = lambda item: (item.spec.model, item.spec.dtype, TASKS.index(item.unit.task))  # noqa: E731
    single = sorted((item for item in todo if _is_single(item.spec)), key=order)
    refused = []
    with _progress(len(todo)) as advance:

        def done(idx: int, answer: dict[str, Any]) -> None:
            item = single[idx]
            if "row" in answer:
                answer["row"]["detail"] |= {name: answer[name] for name in ("seconds", "cpu_s")}
                store.add(item, answer["row"])
            else:
                refused.append((item, answer["refused"]))
            advance(item, answer.get("row"))

        if single:
            measure_all([(item.spec, item.unit) for item in single], workers, folder, done)
        refused += _measure_on_ranks([item for item in todo if not _is_single(item.spec)], store, folder, advance)
    return refused


def _is_single(spec: Any) -> bool:
    return spec.backend == "hf" and spec.ranks == 1


def _measure_on_ranks(items: list, store: Any, folder: Path, advance: Callable) -> list[tuple[Any, str]]:
    """Items that need several ranks or another host, those of the same options in one job."""
    from pikv_ds.errors import UnsupportedError
    from pikv_ds.launch.evaluation.partial import Partial, key_of

    from .eval import run_units

    refused = []
    for spec in dict.fromkeys(item.spec for item in items):
        own, path = [item for item in items if item.spec == spec], store.partial.path
        for item in own:  # of a job that was stopped
            if (row := store.partial.rows.get(key_of(spec, item.unit))) is not None:
                store.add(item, row)
        own = [item for item in own if not store.has(item)]
        if not own:
            continue
        try:
            status = run_units(spec, [item.unit for item in own], store.partial, folder)
        except UnsupportedError as error:
            refused += [(own[0], str(error))]
            status = 0
        found = Partial(path).rows
        for item in own:  # also those before the one that ended the job
            if (row := found.get(key_of(spec, item.unit))) is not None:
                store.add(item, row)
            advance(item, row)
        if status:
            raise RuntimeError(f"{spec.ranks} rank(s) of {spec.backend} ended with status {status}")
    return refused


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable]:
    """A function that is told of finished items: a bar with the time left on a terminal, a line per item elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    started, count = time.monotonic(), 0

    def line(item: Any, row: dict[str, Any] | None) -> None:
        nonlocal count
        count += 1
        left = (time.monotonic() - started) / count * (total - count)
        print(f"{count}/{total}, about {left / 60:.0f} min left: {_said(item)}{'' if row else ': refused'}", flush=True)

    if not sys.stdout.isatty():
        yield line
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(), redirect_stdout=False, redirect_stderr=False) as progress:
        task = progress.add_task("", total=total)
        yield lambda item, row: progress.update(task, advance=1, description=_said(item))


def _said(item: Any) -> str:
    return f"{item.family or 'all'}, {item.label}, {item.unit.task} at {item.spec.context}"

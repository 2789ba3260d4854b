"""One rank of an evaluation: in the command's process, or started by a launcher with the arguments spec, rows and error file."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from pikv_ds.launch.evaluation.partial import Partial, key_of
from pikv_ds.launch.evaluation.spec import EvalSpec, Unit, from_json
from pikv_ds.launch.ranks import free_port, own_stdout, started_ranks


def evaluate(spec: EvalSpec, units: list[Unit], partial: Partial | None, stdout: TextIO | None) -> None:
    """Measure every unit. On the rank that has them, rows go to `partial` as they come and progress goes to `stdout`."""
    import torch

    from pikv_ds.launch.evaluation.rows import method_name

    with open_backend(spec, units) as backend, torch.no_grad():
        prose = prose_of(backend, spec)
        for unit in units:
            title = f"{unit.task}, {unit.other or method_name(_config(unit))}"
            with progress_bar(title, _own_samples(spec), stdout) as advance:
                row = measure_unit(backend, spec, prose, unit, advance)
            if partial is not None:
                partial.add(key_of(spec, unit), row)


def prose_of(backend: Any, spec: EvalSpec) -> Any:
    """The text that the run measures on, in the backend's tokens."""
    from pikv_ds.bundled import evaluation_text
    from pikv_ds.bundled.recall import Prose

    return Prose(backend.tokenizer, Path(spec.text).read_text(encoding="utf-8") if spec.text else evaluation_text())


def measure_unit(backend: Any, spec: EvalSpec, prose: Any, unit: Unit, advance: Callable[[int], None]) -> dict[str, Any]:
    """The row of one unit, the same on every rank. Collective over the job; call it under torch.no_grad()."""
    from pikv_ds.launch.evaluation.rows import Measured, build_row

    measure = _measure(unit.task)
    if unit.other is None:
        return build_row(backend, spec, unit, Measured(backend.data_rank, *measure(backend, spec, prose, unit.block, advance)))
    from pikv_ds.launch.evaluation.others import Beside, named, parse_other

    beside = Beside(backend, parse_other(unit.other))
    row = build_row(beside, spec, unit, Measured(backend.data_rank, *measure(beside, spec, prose, {}, advance)))
    return named(row, beside.other)


def _measure(task: str) -> Callable:
    """(backend, spec, prose, block, advance) -> result, Memory, tokens."""
    from pikv_ds.launch.evaluation.agreement import measure_agreement
    from pikv_ds.launch.evaluation.ppl import measure_ppl
    from pikv_ds.launch.evaluation.recall import measure_answers, measure_recall
    from pikv_ds.launch.evaluation.ruler import ruler_prompts
    from pikv_ds.launch.evaluation.size import measure_bytes

    own = {"ppl": measure_ppl, "recall": measure_recall, "bytes": measure_bytes, "agreement": measure_agreement}
    if task in own:
        return own[task]
    return lambda backend, spec, prose, block, advance: measure_answers(backend, spec, ruler_prompts(spec, prose, task), block, advance)


def backend_class(name: str) -> type:
    """The class of a backend; imports its host, and only that one."""
    if name == "hf":
        from pikv_ds.launch.evaluation.hf import HFBackend

        return HFBackend
    from pikv_ds.launch.evaluation.megatron import MegatronBackend

    return MegatronBackend


@contextlib.contextmanager
def open_backend(spec: EvalSpec, units: list[Unit]) -> Iterator[Any]:
    timeout_s = max((config.timeout_s for unit in units if (config := _config(unit))), default=300)
    backend = backend_class(spec.backend)(spec, timeout_s)
    try:
        yield backend
    finally:
        backend.close()


def _config(unit: Unit) -> Any:
    from pikv_ds.config.pikv import PiKVConfig

    return None if unit.block is None else PiKVConfig.parse(unit.block)


def _own_samples(spec: EvalSpec) -> int:
    return spec.samples // spec.data_ranks if spec.requests == "distinct" else spec.samples


@contextlib.contextmanager
def progress_bar(title: str, total: int, stdout: TextIO | None, unit: str = "samples") -> Iterator[Callable[[int], None]]:
    """A function that counts units: a bar on a terminal, one line elsewhere, nothing without a stream."""
    if stdout is None:
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if not stdout.isatty():
        print(f"{title}: {total} {unit}", file=stdout, flush=True)
        yield lambda done: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Redirection would bring what libraries write to stderr back to the terminal.
    with Progress(*columns, console=Console(file=stdout), transient=True, redirect_stdout=False, redirect_stderr=False) as progress:
        task = progress.add_task(title, total=total)
        yield lambda done: progress.advance(task, done)


def start_distributed() -> None:
    """torch.distributed over the ranks of the launcher, each on its own device, or over this process alone."""
    import torch.distributed as dist

    from pikv_ds.launch.device import own_device

    device = own_device()
    alone = {} if started_ranks() else {"init_method": f"tcp://127.0.0.1:{free_port()}", "rank": 0, "world_size": 1}
    dist.init_process_group("nccl" if device == "cuda" else "gloo", **alone)


@contextlib.contextmanager
def as_rank(error_file: Path) -> Iterator[bool]:
    """The work of one rank of a launcher's: whether it is the first, which leaves in error_file what users are to be told."""
    import torch.distributed as dist

    from pikv_ds.launch.cli import TOLD

    start_distributed()
    first = dist.get_rank() == 0
    try:
        yield first
    except TOLD as error:
        if first:
            error_file.write_text(str(error), encoding="utf-8")
        raise
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    stdout = own_stdout()
    spec_file, rows, error_file = map(Path, sys.argv[1:4])
    with as_rank(error_file) as first:
        spec, units = from_json(spec_file.read_text(encoding="utf-8"))
        evaluate(spec, units, Partial(rows) if first else None, stdout if first else None)


if __name__ == "__main__":
    main()

"""`pikv baseline`: transformers' own quantised caches, measured as `pikv eval` measures ours, on one rank."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from pikv_ds.launch.cmd_eval import add_arguments, command_line, finish

CACHES = "quanto:4,quanto:2,hqq:4,hqq:2,fp8"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("baseline", help="transformers' quantised caches under the tasks of pikv eval")
    parser.add_argument("--caches", default=CACHES, metavar="LIST", help=f"comma-separated backend:bits (default: {CACHES})")
    add_arguments(parser)
    parser.set_defaults(backend="hf", ranks=1)


def run(args: argparse.Namespace) -> int:
    from pikv_ds.errors import ConfigError
    from pikv_ds.launch.evaluation.hf_quantized import HFCacheKind
    from pikv_ds.launch.evaluation.plan import read_spec

    for name in ("config", "sweep", "load"):
        if getattr(args, name) is not None:
            raise ConfigError(f"--{name} with pikv baseline: it measures transformers' own caches; use pikv eval")
    kinds = [HFCacheKind.parse(text) for text in args.caches.split(",")]
    spec, units = read_spec(args)
    tasks = [unit.task for unit in units if unit.block is None]
    rows = []
    for kind in (None, *kinds):
        rows += _rows(spec, kind, tasks)
    finish(args, command_line(args, "pikv baseline", given=("backend", "ranks")), spec, rows)
    return 0


def _rows(spec: Any, kind: Any, tasks: list[str]) -> list[dict[str, Any]]:
    """The rows of one kind of cache, None = the dense one; none, and a line on stderr, where its package is not installed."""
    import torch
    from transformers import AutoConfig

    from pikv_ds.bundled import evaluation_text
    from pikv_ds.bundled.recall import Prose
    from pikv_ds.launch.evaluation.hf import HFBackend
    from pikv_ds.launch.evaluation.hf_quantized import QuantizedBackend
    from pikv_ds.launch.evaluation.job import progress_bar
    from pikv_ds.launch.evaluation.ppl import measure_ppl
    from pikv_ds.launch.evaluation.recall import measure_recall
    from pikv_ds.launch.evaluation.rows import Measured, build_row
    from pikv_ds.launch.evaluation.spec import Unit
    from pikv_ds.launch.output import package_version

    title = "dense" if kind is None else kind.name
    if kind is not None:
        try:
            kind.make(AutoConfig.from_pretrained(spec.model, local_files_only=True))
        except ImportError as error:
            print(f"pikv baseline: {title} is skipped: {' '.join(str(error).split())}", file=sys.stderr)
            return []
    backend = HFBackend(spec, 300) if kind is None else QuantizedBackend(spec, kind)
    text = evaluation_text() if spec.text is None else open(spec.text, encoding="utf-8").read()  # noqa: SIM115
    rows = []
    for task in tasks:
        measure = {"ppl": measure_ppl, "recall": measure_recall}[task]
        with progress_bar(f"{task}, {title}", spec.samples, sys.stdout) as advance, torch.no_grad():
            result, memory, tokens = measure(backend, spec, Prose(backend.tokenizer, text), None if kind is None else {}, advance)
        row = build_row(backend, spec, Unit(task=task, block=None), Measured(backend.data_rank, result, memory, tokens))
        package = None if kind is None or kind.package is None else f"{kind.package} {package_version(kind.package)}"
        rows.append(row if kind is None else row | {"method": title, "config": {"cache": title, "package": package}})
    return rows

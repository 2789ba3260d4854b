"""`pikv baseline`: transformers' own quantised caches, measured as `pikv eval` measures ours, beside ours, on one rank."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from .eval import add_arguments, command_line, finish

CACHES = "quanto:4,quanto:2,hqq:4,hqq:2,hqq:4:1,hqq:2:1,fp8,pikv:none,pikv:int8,pikv:int4,pikv:int2"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("baseline", help="transformers' quantised caches under the tasks of pikv eval, beside ours")
    what = "comma-separated backend:bits or backend:bits:axis of transformers, or pikv:METHOD, a compression of ours; a package that is "
    what += f"missing is an error, in the default list it is named and left out (default: {CACHES})"
    parser.add_argument("--caches", metavar="LIST", help=what)
    times = "also time a prompt and 128 decode steps N times, the caches in turn (default 0: not)"
    parser.add_argument("--repeats", type=int, default=0, metavar="N", help=times)
    add_arguments(parser)
    parser.set_defaults(backend="hf", ranks=1)


def run(args: argparse.Namespace) -> int:
    import torch
    from transformers import AutoConfig

    from pikv_ds.errors import ConfigError
    from pikv_ds.launch.evaluation.baseline import Baseline, parse
    from pikv_ds.launch.evaluation.plan import read_spec

    for name in ("config", "sweep", "load", "tokenizer"):
        if getattr(args, name) is not None:
            raise ConfigError(f"--{name} with pikv baseline: it measures transformers' own caches; use pikv eval")
    if args.repeats < 0:
        raise ConfigError(f"--repeats {args.repeats}: legal is 0 or more")
    asked_for = args.caches is not None
    args.caches = args.caches or CACHES  # the command that is written down names them
    contenders = [parse(text) for text in args.caches.split(",")]
    spec, units = read_spec(args)
    model_config = AutoConfig.from_pretrained(spec.model, local_files_only=True)
    present = [contender for contender in contenders if not _missing(contender, model_config, asked_for)]
    baseline = Baseline(spec, present, args.repeats)
    with torch.no_grad():
        rows = baseline.rows([unit.task for unit in units if unit.block is None], sys.stdout)
    finish(args, command_line(args, "pikv baseline", given=("backend", "ranks")), spec, rows)
    return 0


def _missing(contender: Any, model_config: Any, asked_for: bool) -> bool:
    """True, with a line on stderr, when its package is not installed. Raises ConfigError where the user named the cache."""
    from pikv_ds.errors import ConfigError

    if contender.kind is None:
        return False
    try:
        contender.kind.make(model_config)
    except ImportError as error:
        why = f"{contender.title} needs the package {contender.kind.package}: {' '.join(str(error).split())}"
        if asked_for:
            raise ConfigError(f"--caches: {why}") from None
        print(f"pikv baseline: left out: {why}", file=sys.stderr)
        return True
    return False

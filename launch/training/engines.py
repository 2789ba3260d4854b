"""The engines that `pikv train --engine` names: what each asks of the arguments, before a model is loaded."""

from __future__ import annotations

import argparse
from pathlib import Path

from pikv_ds.errors import ConfigError

ENGINES = ("local", "deepspeed", "megatron")
DEFAULT_LR = 3e-3


def check_engine(args: argparse.Namespace) -> None:
    """Raises: ConfigError for an argument that this engine would not look at; FileNotFoundError for a --config that is not there."""
    name = args.engine
    if args.ranks < 1:
        raise ConfigError(f"--ranks {args.ranks}: legal is 1 or more")
    if name == "local" and args.ranks != 1:
        raise ConfigError(f"--ranks {args.ranks} with --engine local, which is one process; use --ranks 1, or another engine")
    if args.config is not None:
        if name != "deepspeed":
            raise ConfigError(f"--config {args.config} is DeepSpeed's, and --engine {name} does not read it; leave it out")
        if not Path(args.config).is_file():
            raise FileNotFoundError(f"no file {args.config!r}; --config is DeepSpeed's ds.json")
    if name != "megatron" and (args.tp != 1 or args.ep is not None):
        raise ConfigError(
            f"--tp and --ep are of --engine megatron; with --engine {name} leave them out"
            + (': experts are spread by "expert_parallel" in --config' if name == "deepspeed" else "")
        )
    if name == "megatron":
        _check_layout(args)


def _check_layout(args: argparse.Namespace) -> None:
    if args.tp < 1 or args.ranks % args.tp:
        raise ConfigError(f"--tp {args.tp} with --ranks {args.ranks}: it must be a positive divisor of them")
    data = args.ranks // args.tp
    if args.ep is not None and (args.ep < 1 or args.ranks % args.ep):
        raise ConfigError(f"--ep {args.ep} with --ranks {args.ranks}: it must be a positive divisor of them")
    if args.dtype != "float32":
        raise ConfigError(f"--dtype {args.dtype} with --engine megatron, whose parts train in float32 on {data} data rank(s); leave it out")

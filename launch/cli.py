"""The `pikv` command. Each subcommand is a file of commands/ with two functions:

add_parser(subparsers): declare the subcommand and its arguments. Import nothing heavy at the top: each start runs it.
run(args) -> int: do the work and return the exit status. `args.json` is there for every subcommand.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys

import pikv_ds
from pikv_ds.errors import CapacityError, ConfigError, DivergedError, PeerError, SessionError, TrainingError, UnsupportedError
from pikv_ds.launch import commands
from pikv_ds.launch.device import let_memory_grow
from pikv_ds.launch.output import note_command_line

# Errors that tell the user what to do; anything else is a bug and keeps its traceback.
TOLD = (
    ConfigError,
    UnsupportedError,
    CapacityError,
    PeerError,
    DivergedError,
    SessionError,
    TrainingError,
    FileNotFoundError,
    argparse.ArgumentTypeError,
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pikv", description=pikv_ds.__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=f"pikv-ds {pikv_ds.__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    for found in pkgutil.iter_modules(commands.__path__):
        if found.name.startswith("_"):
            continue
        command = importlib.import_module(f"{commands.__name__}.{found.name}")
        known = set(subparsers.choices)
        command.add_parser(subparsers)
        for name in set(subparsers.choices) - known:
            added = subparsers.choices[name]
            added.add_argument("--json", metavar="FILE", help="also write command, versions, machine and rows to FILE")
            added.set_defaults(run=command.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    note_command_line(sys.argv[1:] if argv is None else argv)
    let_memory_grow()
    try:
        return args.run(args)
    except TOLD as error:
        print(f"pikv {args.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

"""docs/reference/commands.md, from the parser of `pikv`."""

import argparse

from pikv_ds.launch.cli import build_parser

from .tables import MADE, table

HEAD = f"""# Commands

{MADE}
Each command takes `--json FILE` and writes `{{"command", "versions", "machine", "rows"}}`. `pikv COMMAND --help` prints the same.
"""


def written() -> str:
    commands = _commands(build_parser())
    parts = [HEAD, table(("command", "what"), [(f"[`pikv {name}`](#pikv-{name})", what) for name, what, _ in commands])]
    for name, what, parser in commands:
        parts += [f"## `pikv {name}`\n", f"{what[0].upper()}{what[1:]}.\n", *_options(parser)]
        for inner, said, below in _commands(parser):
            parts += [f"### `pikv {name} {inner}`\n", f"{said[0].upper()}{said[1:]}.\n", *_options(below)]
    return "\n".join(parts)


def _commands(parser: argparse.ArgumentParser) -> list[tuple[str, str, argparse.ArgumentParser]]:
    """(name, one line, parser) of the subcommands, in the order in which they were added."""
    (found,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)] or [None]
    return [] if found is None else [(one.dest, one.help.rstrip("."), found.choices[one.dest]) for one in found._choices_actions]


def _options(parser: argparse.ArgumentParser) -> list[str]:
    rows = []
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction | argparse._SubParsersAction):
            continue
        rows.append((_words(action), _default(action), (action.help or "").replace("%%", "%")))
    return [table(("argument", "default", "what"), rows)] if rows else []


def _words(action: argparse.Action) -> str:
    value = "{" + ",".join(map(str, action.choices)) + "}" if action.choices is not None else action.metavar or action.dest.upper()
    if not action.option_strings:
        return f"`{value}`"
    takes = "" if action.nargs == 0 else f" {value}" + (" ..." if action.nargs in ("+", "*") else "")
    return ", ".join(f"`{option}{takes}`" for option in action.option_strings)


def _default(action: argparse.Action) -> str:
    if action.default is None or action.default is False or action.default == argparse.SUPPRESS or action.nargs == 0:
        return "required" if action.required and action.option_strings else "-"
    value = action.default
    return f"`{' '.join(map(str, value)) if isinstance(value, list | tuple) else value}`"

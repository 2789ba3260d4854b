"""What every command prints and writes: tables on the terminal, one JSON layout on disk."""

from __future__ import annotations

import json
import os
import platform
import shlex
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pikv_ds

_words: list[str] = []  # of the command line, without where it writes to
_SIDEWAYS_WIDTH = 14  # characters a column needs to be read on its side
HOSTS = ("torch", "deepspeed", "megatron-core", "transformers")


def versions() -> dict[str, str | None]:
    """Versions of Python, pikv_ds and its hosts; None where a host is not installed."""
    return {
        "python": platform.python_version(),
        "pikv-ds": pikv_ds.__version__,
        **{name: package_version(name) for name in HOSTS},
    }


def package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """The hardware a number was measured on. No host name, no user, no path."""
    import torch

    gpus = [torch.cuda.get_device_name(idx) for idx in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": gpus or None,
    }


def note_command_line(words: Sequence[str]) -> None:
    """What `document_of` says behind the name of a command. words: after `pikv`; --json FILE is left out."""
    at = next((i for i, word in enumerate(words) if word == "--json"), len(words))
    _words[:] = [word for word in (*words[:at], *words[at + 2 :]) if not word.startswith("--json=")]


def document_of(command: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows with the command that made them, versions and machine. command: its name, which the command line completes; or all of it."""
    name = command.split()
    if _words[: len(name)] == name:
        command = shlex.join(_words)
    return {"command": command, "versions": versions(), "machine": machine(), "rows": rows}


def write_json(path: str | None, command: str, rows: list[dict[str, Any]], **tables: list[dict[str, Any]]) -> None:
    """Write {"command", "versions", "machine", "rows"} and further tables to `path`; nothing when the user gave no --json."""
    if path is None:
        return
    document = document_of(command, rows) | tables
    Path(path).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def print_table(title: str, rows: list[dict[str, Any]]) -> None:
    """One line per row, one column per key of the first row; where that is too wide, on its side, or a paragraph per row if those are many.

    Nothing is cut: only the last column wraps, and on its side every column may.
    """
    from rich.console import Console

    console = Console()
    cells = [[_cell(value) for value in row.values()] for row in rows]
    names = list(rows[0])
    if _natural_width(names, cells) <= console.width:
        console.print(_table(title, names, cells, wrap_all=False))
        return
    if console.width // (len(rows) + 1) < _SIDEWAYS_WIDTH:
        console.print(f"{title}\n", style="italic", markup=False, highlight=False)
        console.print(_paragraphs(names, cells))
        return
    sideways = [[name, *(row[idx] for row in cells)] for idx, name in enumerate(names)]
    console.print(_table(title, sideways[0], sideways[1:], wrap_all=True))


def _paragraphs(names: list[str], cells: list[list[str]]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for row in cells:
        table.add_row(f"[bold]{escape(row[0])}[/bold]", "")
        for name, cell in zip(names[1:], row[1:], strict=True):
            if cell != "-":
                table.add_row(f"  {escape(name)}", escape(cell))
    return table


def _natural_width(names: list[str], cells: list[list[str]]) -> int:
    """Characters a table takes, with 3 between columns and 1 at each edge, when its last column wraps at 24."""
    widths = [max(len(row[idx]) for row in [names, *cells]) for idx in range(len(names))]
    return sum(widths[:-1]) + min(widths[-1], max(24, len(names[-1]))) + 3 * (len(names) - 1) + 2


def _table(title: str, names: list[str], cells: list[list[str]], *, wrap_all: bool) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for idx, name in enumerate(names):
        is_amount = not wrap_all and all(row[idx][0].isdigit() or row[idx] == "-" for row in cells)
        wraps = wrap_all or idx == len(names) - 1
        justify = "right" if is_amount else "left"
        table.add_column(escape(name), justify=justify, overflow="fold", no_wrap=not wraps)
    for row in cells:
        table.add_row(*map(escape, row))
    return table


def human_bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return text or "-"


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

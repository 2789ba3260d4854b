"""What every command prints and writes: tables on the terminal, one JSON layout on disk."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pikv_ds

_PACKAGES = ("torch", "deepspeed", "megatron-core", "transformers")


def versions() -> dict[str, str | None]:
    """Versions of Python, pikv_ds and its hosts; None where a host is not installed."""
    return {
        "python": platform.python_version(),
        "pikv-ds": pikv_ds.__version__,
        **{name: package_version(name) for name in _PACKAGES},
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


def write_json(path: str | None, command: str, rows: list[dict[str, Any]]) -> None:
    """Write {"command", "versions", "machine", "rows"} to `path`; nothing when the user gave no --json."""
    if path is None:
        return
    document = {"command": command, "versions": versions(), "machine": machine(), "rows": rows}
    Path(path).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def print_table(title: str, rows: list[dict[str, Any]]) -> None:
    """One line per row, one column per key of the first row; amounts to the right. Only the last column wraps."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    *_, last = rows[0]
    for key, value in rows[0].items():
        is_amount = _cell(value)[0].isdigit()
        table.add_column(key, justify="right" if is_amount else "left", overflow="fold", no_wrap=key != last)
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    Console().print(table)


def human_bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def _cell(value: Any) -> str:
    from rich.markup import escape

    if value is None:
        return "-"
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return escape(text) or "-"


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

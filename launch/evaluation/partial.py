"""Finished rows in a file beside --json, so that a command that was stopped goes on with the units it has not done."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pikv_ds

from .spec import EvalSpec, Unit


class Partial:
    """Rows by the key of what they measured. A change of the command, the model's files or the version gives other keys."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def add(self, key: str, row: dict[str, Any]) -> None:
        self.rows[key] = row
        written = self.path.with_name(self.path.name + ".new")
        written.write_text(json.dumps(self.rows), encoding="utf-8")
        os.replace(written, self.path)  # never half a file

    def unfinished(self, spec: EvalSpec, units: list[Unit]) -> list[Unit]:
        """The units without a row; says on the terminal how many have one."""
        todo = [unit for unit in units if key_of(spec, unit) not in self.rows]
        if len(todo) < len(units):
            print(f"{len(units) - len(todo)} of {len(units)} units are in {self.path} already", flush=True)
        return todo

    def rows_of(self, spec: EvalSpec, units: list[Unit]) -> list[dict[str, Any]]:
        return [self.rows[key_of(spec, unit)] for unit in units]

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def key_of(spec: EvalSpec, unit: Unit) -> str:
    sources = [Path(name) for name in (spec.model, spec.load, spec.text) if name is not None]
    files = [file for source in sources for file in (sorted(source.iterdir()) if source.is_dir() else [source])]
    prints = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return json.dumps([pikv_ds.__version__, asdict(spec), asdict(unit), prints], sort_keys=True)

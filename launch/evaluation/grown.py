"""Where a sweep puts its rows as they come: beside --json until all are there, or with --add into that file itself, which grows."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.errors import ConfigError
from pikv_ds.launch.output import document_of

from .partial import Partial, key_of
from .spec import EvalSpec, scored_queries
from .sweep import Item, model_name, sweep_row

Row = dict[str, Any]


class UntilDone:
    """Rows of one command, kept until it has them all. A change of the list, the model's files or the version gives other keys."""

    def __init__(self, partial: Partial) -> None:
        self.partial = partial

    def has(self, item: Item) -> bool:
        return key_of(item.spec, item.unit) in self.partial.rows

    def apart(self, item: Item) -> str:
        """What tells units that are the same measurement apart: nothing, the row is used twice."""
        return ""

    def add(self, item: Item, row: Row) -> None:
        self.partial.add(key_of(item.spec, item.unit), row)

    def rows_of(self, items: list[Item]) -> list[Row]:
        return [sweep_row(item, self.partial.rows[key_of(item.spec, item.unit)]) for item in items]

    def finish(self) -> None:
        self.partial.remove()


class Grown:
    """Rows by what they measured, whatever machine, version or copy of the model they were measured on; each names its processor.

    Versions and machine of the document are those of the command that wrote it last.
    """

    def __init__(self, path: Path, command: str, partial: Partial) -> None:
        """partial: rows of a job of several ranks, until it has ended. Raises: ConfigError where the file holds something else than rows
        of a sweep."""
        self.path, self.partial = path, partial
        document = _read(path)
        self.document = document_of(command, document["rows"])
        processor = document.get("machine", {}).get("cpu")
        for row in self.rows:
            row["detail"].setdefault("cpu", processor)
        self.known = {key_of_row(row): row for row in self.rows}

    @property
    def rows(self) -> list[Row]:
        return self.document["rows"]

    def apart(self, item: Item) -> str:
        """What tells units that are the same measurement apart: the row is found by its label."""
        return f"{item.family}/{item.label}"

    def has(self, item: Item) -> bool:
        return key_of_item(item) in self.known

    def add(self, item: Item, row: Row) -> None:
        """The file has the row when this returns: it is written whole beside itself and moved there."""
        made = sweep_row(item, row)
        made["detail"] |= {"cpu": self.document["machine"]["cpu"]}
        self.known[key_of_row(made)] = made
        self.rows.append(made)
        self._write()

    def rows_of(self, items: list[Item]) -> list[Row]:
        return [self.known[key_of_item(item)] for item in items]

    def finish(self) -> None:
        """The rows are where they belong."""
        self.partial.remove()

    def _write(self) -> None:
        written = self.path.with_name(self.path.name + ".new")
        written.write_text(json.dumps(self.document, indent=1) + "\n", encoding="utf-8")
        os.replace(written, self.path)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {"rows": []}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"--add --json {path}: it is not JSON ({error}); name a file that `pikv sweep --json` wrote, or a new one"
        ) from None
    if not all("label" in row.get("detail", {}) for row in document.get("rows", [{}])):
        raise ConfigError(f"--add --json {path}: it holds other rows than those of a sweep; name a file that `pikv sweep --json` wrote")
    return document


def key_of_item(item: Item) -> str:
    spec, config = item.spec, None if item.unit.block is None else PiKVConfig.parse(item.unit.block)
    return _key(
        item.family, item.label, model_name(Path(spec.model)), item.unit.task,
        None if config is None else config.model_dump(mode="json", exclude_defaults=True),
        [getattr(spec, name) for name in _OF_ROW], min(spec.batch, spec.samples), spec.samples, spec.requests, spec.prefill_chunk,
        _scored(spec, item.unit.task), spec.template is False,
    )  # fmt: skip


def key_of_row(row: Row) -> str:
    detail = row["detail"]
    return _key(
        detail["family"], detail["label"], detail["model"], row["task"], row["config"], [row[name] for name in _OF_ROW], detail["batch"],
        detail["samples"], detail["requests"], detail.get("prefill_chunk"), detail.get("scored_tokens"), detail.get("plain_prompts", False),
    )  # fmt: skip


_OF_ROW = ("backend", "ranks", "tp", "ep", "context", "chunk", "seed", "dtype")


def _scored(spec: EvalSpec, task: str) -> int | None:
    return spec.samples * len(scored_queries(spec.context, spec.scored)) if task == "ppl" else None


def _key(*parts: Any) -> str:
    return json.dumps(parts, sort_keys=True)

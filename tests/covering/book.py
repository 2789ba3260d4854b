"""array.json: the cases that run, and the pairs that are refused with the rule. Only what is not the default is written."""

from __future__ import annotations

import json
from pathlib import Path

from .settings import Case, defaults

BOOK = Path(__file__).parent / "array.json"


def write(runs: list[Case], refused: list[tuple[Case, str]]) -> None:
    by_rule: dict[str, list] = {}
    for case, rule in refused:
        by_rule.setdefault(rule, []).append(_changes(case))
    BOOK.write_text(_lines({"runs": [_changes(case) for case in runs]} | {"refused": dict(sorted(by_rule.items()))}), encoding="utf-8")


def read() -> tuple[list[Case], list[tuple[Case, str]]]:
    book = json.loads(BOOK.read_text(encoding="utf-8"))
    refused = [(defaults() | case, rule) for rule, cases in book["refused"].items() for case in cases]
    return [defaults() | case for case in book["runs"]], refused


def _changes(case: Case) -> Case:
    return {name: value for name, value in case.items() if value != defaults()[name]}


def _lines(book: dict) -> str:
    """A case a line."""
    runs = ",\n".join(f"  {json.dumps(case)}" for case in book["runs"])
    rules = ",\n".join(
        f"  {json.dumps(rule)}: [\n" + ",\n".join(f"   {json.dumps(case)}" for case in cases) + "\n  ]"
        for rule, cases in book["refused"].items()
    )
    return f'{{\n "runs": [\n{runs}\n ],\n "refused": {{\n{rules}\n }}\n}}\n'

"""Markdown tables for the generated documents."""

from collections.abc import Iterable, Sequence

MADE = "Made by `python -m tests.docs`; do not edit it by hand.\n"


def cell(value: object) -> str:
    """One line, with what would end the cell escaped."""
    return " ".join(str(value).split()).replace("|", "\\|")


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(map(cell, row))} |" for row in rows)]
    return "\n".join(lines) + "\n"

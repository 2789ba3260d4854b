"""Whether what a step reads and writes still lies where it lay: a number that changes when memory of the pages is replaced."""

from __future__ import annotations

from typing import Any


class Addresses:
    """One of a rank's pages, tables, stacks and directory. Who replaces one of them says so."""

    def __init__(self) -> None:
        self.generation = 0
        """Equal at two moments: between them every one of these tensors has been written in place only."""
        self.kept: Any = None
        """What somebody has looked up of these tensors. It goes with the first of them, so that it keeps no old memory alive."""

    def moved(self) -> None:
        self.generation += 1
        self.kept = None

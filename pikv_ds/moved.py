"""Old places of public names: the module they were imported from still gives them."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any


def moved(module: str, places: dict[str, str]) -> Callable[[str], Any]:
    """A `__getattr__` for `module`: names that are defined elsewhere now. places: name -> "module" or "module:new name"."""

    def find(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        where, _, new = places[name].partition(":")
        return getattr(import_module(where), new or name)

    return find

"""The mutants, by area. A module has MUTANTS."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from tests.mutants.mutant import Mutant


def mutants() -> list[Mutant]:
    found = [
        each
        for module in sorted(module.name for module in iter_modules(__path__))
        for each in import_module(f"{__name__}.{module}").MUTANTS
    ]
    names = [each.name for each in found]
    assert len(set(names)) == len(names), "two mutants have one name"
    return found

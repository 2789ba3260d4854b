"""Registries of methods: a method is one file with one decorator, found because its package imports every sibling."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterator
from typing import Any


class Registry:
    """Names of one kind of method (`kind` is the word used in error messages) and the classes behind them."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._classes: dict[str, type] = {}
        self.removed: dict[str, str] = {}
        """Names of earlier versions: why they are gone and what to use instead."""

    def register(self, name: str) -> Callable[[type], type]:
        """Class decorator: file the class under `name` and set its `name` attribute."""

        def add(cls: type) -> type:
            if name in self.removed:
                raise ValueError(f"{self.kind} {name!r} was removed and its name is not given again yet; use another name")
            if name in self._classes:
                taken = self._classes[name]
                raise ValueError(
                    f"{self.kind} {name!r} is already registered by {taken.__module__}.{taken.__qualname__}; "
                    f"give {cls.__module__}.{cls.__qualname__} another name"
                )
            cls.name = name
            self._classes[name] = cls
            return cls

        return add

    def refuse(self, name: str, instead: str) -> None:
        """Asking for `name`, which was a method once, says `instead`: why it is gone and what to use."""
        self.removed[name] = instead

    def get(self, name: str) -> type:
        if name in self.removed:
            raise ValueError(f"{self.kind} {name!r} was removed: {self.removed[name]}")
        if name not in self._classes:
            raise ValueError(f"unknown {self.kind} {name!r}; legal: {', '.join(self.names())}")
        return self._classes[name]

    def build(self, name: str, **options: Any) -> Any:
        """Construct the method; `options` are its keyword-only constructor arguments."""
        return self.get(name)(**options)

    def names(self) -> list[str]:
        return sorted(self._classes)

    def items(self) -> Iterator[tuple[str, type]]:
        return iter(sorted(self._classes.items()))


def load_siblings(package: str) -> None:
    """Import every module of `package` once, so that their decorators run. Call it last in the package's __init__."""
    for module in pkgutil.iter_modules(sys.modules[package].__path__):
        importlib.import_module(f"{package}.{module.name}")

"""Registries of methods: a method is a class with one decorator.

Those of this package are found because their package imports every sibling, those of other installed distributions through entry points.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pikv_ds.errors import ConfigError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "pikv_ds.methods"


class Outside:
    """Methods of other distributions: modules that their entry points of one group name. Loaded once, in the same order everywhere."""

    def __init__(self, group: str) -> None:
        self.group = group
        self._begun = False
        self._refusal: str | None = None

    @cached_property
    def entries(self) -> list[EntryPoint]:
        """The entry points of the group, by distribution. Imported here: reading the metadata of an environment takes milliseconds."""
        from importlib.metadata import entry_points

        return sorted(entry_points(group=self.group), key=lambda entry: (_distribution(entry), entry.name))

    def load(self) -> None:
        """Import what the entry points name. Raises: ConfigError, at this and every later call, when one of them cannot be imported."""
        if self._refusal is not None:
            raise ConfigError(self._refusal)
        if self._begun:  # also while loading: a module may read the registries
            return
        self._begun = True
        for entry in self.entries:
            try:
                entry.load()
            except Exception as error:
                self._refusal = (
                    f"the methods of {_distribution(entry)} cannot be loaded: its entry point {entry.name} = {entry.value} "
                    f"(group {self.group}) raises {type(error).__name__}: {error}; `python -c 'import {entry.module}'` shows where; "
                    f"mend or uninstall that distribution"
                )
                raise ConfigError(self._refusal) from error

    def origin(self, cls: type) -> str | None:
        """The distribution whose entry point names the module of `cls`, or a package above or beside it; None: nobody's."""
        own = cls.__module__.split(".")
        shared = [(_shared(own, entry.module.split(".")), entry) for entry in self.entries]
        depth, entry = max(shared, key=lambda found: found[0], default=(0, None))
        return _distribution(entry) if entry is not None and depth else None


class Registry:
    """Names of one kind of method (`kind` is the word used in error messages) and the classes behind them.

    outside: further methods, imported before the registry is first read.
    """

    def __init__(self, kind: str, outside: Outside | None = None) -> None:
        self.kind = kind
        self.outside = outside
        self._classes: dict[str, type[Any]] = {}
        self.removed: dict[str, str] = {}
        """Names of earlier versions: why they are gone and what to use instead."""

    def register(self, name: str) -> Callable[[type], type]:
        """Class decorator: file the class under `name` and set its `name` attribute."""

        def add(cls: type[Any]) -> type[Any]:
            if name in self.removed:
                raise ValueError(f"{self.kind} {name!r} was removed and its name is not given again yet; use another name")
            if name in self._classes:
                taken = self._classes[name]
                raise ValueError(
                    f"{self.kind} {name!r} is already registered by {self._described(taken)}; give {self._described(cls)} another name"
                )
            cls.name = name
            self._classes[name] = cls
            return cls

        return add

    def refuse(self, name: str, instead: str) -> None:
        """Asking for `name`, which was a method once, says `instead`: why it is gone and what to use."""
        self.removed[name] = instead

    def get(self, name: str) -> type[Any]:
        if name in self.removed:
            raise ValueError(f"{self.kind} {name!r} was removed: {self.removed[name]}")
        classes = self._loaded()
        if name not in classes:
            raise ValueError(f"unknown {self.kind} {name!r}; legal: {', '.join(self.names())}")
        return classes[name]

    def build(self, name: str, **options: Any) -> Any:
        """Construct the method; `options` are its keyword-only constructor arguments."""
        return self.get(name)(**options)

    def names(self) -> list[str]:
        return sorted(self._loaded())

    def items(self) -> Iterator[tuple[str, type[Any]]]:
        return iter(sorted(self._loaded().items()))

    def origin(self, name: str) -> str | None:
        """The distribution that a method comes from, "name version"; None: this package, or a module that no entry point names."""
        return None if self.outside is None else self.outside.origin(self.get(name))

    def _loaded(self) -> dict[str, type[Any]]:
        if self.outside is not None:
            self.outside.load()
        return self._classes

    def _described(self, cls: type) -> str:
        origin = None if self.outside is None else self.outside.origin(cls)
        return f"{cls.__module__}.{cls.__qualname__}" + (f" of {origin}" if origin else "")


OUTSIDE = Outside(GROUP)


def load_siblings(package: str) -> None:
    """Import every module of `package` once, so that their decorators run. Call it last in the package's __init__."""
    for module in pkgutil.iter_modules(sys.modules[package].__path__):
        importlib.import_module(f"{package}.{module.name}")


def _distribution(entry: EntryPoint) -> str:
    return "an unknown distribution" if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"


def _shared(one: list[str], other: list[str]) -> int:
    """Leading parts that two dotted names have in common."""
    count = 0
    for x, y in zip(one, other, strict=False):
        if x != y:
            break
        count += 1
    return count

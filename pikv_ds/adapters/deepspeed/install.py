"""Replace functions of the deepspeed module, and put them back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import deepspeed

# name -> (DeepSpeed's function, what stands in its place)
_replaced: dict[str, tuple[Callable, Callable]] = {}


def host_function(name: str) -> Callable:
    """DeepSpeed's own function, also while a replacement of ours stands in its place."""
    return _replaced[name][0] if name in _replaced else getattr(deepspeed, name)


def replace(functions: Mapping[str, Callable]) -> None:
    """Put each function in DeepSpeed's place under its name. A name that is replaced already is left alone."""
    for name, function in functions.items():
        if name not in _replaced:
            host = getattr(deepspeed, name)
            stand_in = functools.wraps(host)(_forward_to(function))
            _replaced[name] = host, stand_in
            setattr(deepspeed, name, stand_in)


def restore() -> None:
    """Put DeepSpeed's functions back; nothing happens if none is replaced."""
    for name, (host, stand_in) in list(_replaced.items()):
        current = getattr(deepspeed, name)
        if current is not stand_in:
            raise RuntimeError(
                f"deepspeed.{name} was replaced again after pikv_ds.install(), by a function of "
                f"{current.__module__}; undo that first, then call pikv_ds.uninstall()"
            )
        setattr(deepspeed, name, host)
        del _replaced[name]


def _forward_to(function: Callable) -> Callable:
    # A new function object: functools.wraps writes DeepSpeed's name and docstring onto it.
    def call(*args, **kwargs):
        return function(*args, **kwargs)

    return call

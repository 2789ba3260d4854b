"""What transformers calls the cache among the arguments and outputs of a forward. A version that renames it adds its word to NAMES."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import transformers
from transformers import GenerationMixin

from pikv_ds.errors import UnsupportedError

NAMES = ("cache", "past_key_values")
"""Newest first: `cache` since 5.24, which still accepts the older word from callers."""


def _found(function: Callable, among: tuple[str, ...]) -> str | None:
    parameters = inspect.signature(function).parameters
    return next((name for name in among if name in parameters), None)


def _name_in_generate() -> str:
    name = _found(GenerationMixin.prepare_inputs_for_generation, NAMES)
    if name is None:
        raise UnsupportedError(
            f"GenerationMixin.prepare_inputs_for_generation of transformers {transformers.__version__} takes none of {', '.join(NAMES)}: "
            "PiKV can't tell its cache from other arguments"
        )
    return name


IN_GENERATE = _name_in_generate()
"""The word of the installed version: in the keyword arguments that generate() hands on, and in outputs."""

_TAKEN = NAMES[NAMES.index(IN_GENERATE) :]  # a newer word than the version's own means something else: XLM's `cache` is no Cache


def cache_name(forward: Callable) -> str | None:
    """By which name a forward takes a cache; None: it takes none. A model outside of transformers may keep an older one."""
    return _found(forward, _TAKEN)


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """`model(ids, **cache_argument(model, cache))` on any version. Raises: UnsupportedError when its forward takes no cache."""
    name = cache_name(model.forward)
    if name is None:
        raise UnsupportedError(f"the forward of {type(model).__name__} takes no {' or '.join(_TAKEN)}")
    return {name: cache}


def cache_of(output: Mapping[str, Any]) -> Any:
    """The cache in what a forward or generate() returned; None: there is none."""
    return output.get(IN_GENERATE)


def given_cache(given: Mapping[str, Any]) -> Any:
    """The cache among arguments by name, whichever name the caller chose. Raises: UnsupportedError for two different ones."""
    newer, older = map(given.get, NAMES)
    if newer is not None and older is not None and newer is not older:
        raise UnsupportedError(f"{' and '.join(NAMES)} are two names of one argument and were given different caches; pass one")
    return older if newer is None else newer


def given_name(given: Mapping[str, Any]) -> str:
    """The name that the caller gave a cache by."""
    return next((name for name in NAMES if given.get(name) is not None), IN_GENERATE)


def renamed(given: Mapping[str, Any], name: str, cache: Any) -> dict[str, Any]:
    """The arguments with `cache` by `name`, and by no other name."""
    return {key: value for key, value in given.items() if key not in NAMES} | {name: cache}

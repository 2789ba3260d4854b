"""Let DeepSpeed 0.19 AutoEP use the output-capture registry of transformers 5.23 and later.

AutoEP looks entries up by class name and with a default (`registry.get(name, default)`, `registry[name] = entry`);
since transformers 5.23 the registry takes the model itself and no default, so AutoEP fails on Qwen3-MoE and Mixtral.
The shim accepts both forms. It is in place only while AutoEP replaces the layers.
Source: deepspeed module_inject/auto_ep_presets/base.py, transformers utils/output_capturing.py.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

from transformers.utils import output_capturing

_NO_DEFAULT = object()
_replaced: dict[str, Any] = {}


def shim_needed() -> bool:
    """True if this transformers has the registry that takes models only."""
    registry = getattr(output_capturing, "_CanRecordRegistry", None)
    return registry is not None and "default" not in inspect.signature(registry.get).parameters


def install_shim() -> bool:
    """Replace the two registry methods if this transformers needs it. Idempotent; True if it is in place."""
    if _replaced or not shim_needed():
        return bool(_replaced)
    registry = output_capturing._CanRecordRegistry
    _replaced.update(get=registry.get, __setitem__=registry.__setitem__)
    registry.get, registry.__setitem__ = _get, _set
    return True


def uninstall_shim() -> None:
    """Put the registry methods back. Entries are untouched: AutoEP restores those itself."""
    for name, method in _replaced.items():
        setattr(output_capturing._CanRecordRegistry, name, method)
    _replaced.clear()


@contextlib.contextmanager
def registry_shim() -> Iterator[None]:
    """Keep the shim in place for the duration of the block, unless it was in place before."""
    was_installed = bool(_replaced)
    install_shim()
    try:
        yield
    finally:
        if not was_installed:
            uninstall_shim()


def _name_of(model: Any) -> str:
    return model if isinstance(model, str) else str(model.__class__)


def _get(self: dict, model: Any, default: Any = _NO_DEFAULT) -> Any:
    entry = dict.get(self, _name_of(model))
    if default is _NO_DEFAULT:
        return entry or {}
    # Without the sentinel a missing entry would be stored back as {}, for the whole class.
    return default if entry is None else entry


def _set(self: dict, model: Any, entry: Any) -> None:
    dict.__setitem__(self, _name_of(model), entry)

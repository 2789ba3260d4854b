"""Which implementation of the ops runs. Nothing happens at import: `ensure` is called by the first op on a device.

PIKV_OPS=torch|cpu|cuda|nvrtc|emu forces one, and then a failure is an error. Unset: the compiled one of the device, and the torch
reference, with one warning, where that cannot be built.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .compile import BuildError, build, cpu_library

CHOICES = ("torch", "cpu", "cuda", "nvrtc", "emu")


@dataclass(frozen=True)
class Backend:
    device: str  # type of the tensors it serves
    load: Callable[[], None]  # build if needed, then register; raises BuildError


def load_cpu() -> None:
    torch.ops.load_library(str(build(cpu_library())))


BACKENDS: dict[str, Backend] = {"cpu": Backend("cpu", load_cpu)}
_PREFERRED = {"cpu": ("cpu",), "cuda": ("cuda", "nvrtc")}
_loaded: dict[str, str] = {}  # device type -> the implementation that serves it


def ensure(device: str) -> bool:
    """Load the compiled ops for a device type unless that was tried before. True when they have just been loaded."""
    if device in _loaded:
        return False
    _loaded[device] = "torch"
    wanted = os.environ.get("PIKV_OPS")
    if wanted == "torch":
        return False
    if wanted is not None:
        return _force(wanted, device)
    reasons = []
    for name in _PREFERRED.get(device, ()):
        if name not in BACKENDS:
            continue
        try:
            BACKENDS[name].load()
        except BuildError as error:
            reasons.append(f"{name}: {error}")
            continue
        _loaded[device] = name
        return True
    why = "; ".join(reasons) or f"there is no compiled version for {device!r} tensors"
    warnings.warn(f"pikv: the ops run in plain torch, slower: {why}", stacklevel=2)
    return False


def _force(wanted: str, device: str) -> bool:
    if wanted not in CHOICES:
        del _loaded[device]
        raise ValueError(f"PIKV_OPS={wanted!r} is not one of {', '.join(CHOICES)}")
    backend = BACKENDS.get(wanted)
    if backend is None or backend.device != device:
        del _loaded[device]
        serves = "is not part of this installation" if backend is None else f"serves {backend.device!r} tensors"
        raise RuntimeError(f"PIKV_OPS={wanted} {serves}, the tensors are on {device!r}; unset it or choose another")
    try:
        backend.load()
    except BuildError:
        del _loaded[device]
        raise
    _loaded[device] = wanted
    return True


def ensured(device: str) -> str:
    """The implementation that serves a device type; loads it if no op has done so yet."""
    ensure(device)
    return _loaded[device]


def loaded() -> dict[str, str]:
    """Implementation per device type that has been used so far."""
    return dict(_loaded)

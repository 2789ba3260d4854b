"""A model that runs as if it did not: its hooks stay silent, and its modes, buffers and random numbers are as before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from pikv_ds.errors import UnsupportedError

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_COPIED = 65536  # numbers of a buffer of integers that is still copied; larger ones are packed weights, which no forward may change


@contextmanager
def at_rest(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Forwards inside are in eval mode and call no hook that was there before. Raises: UnsupportedError, see _restore."""
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        for module in model.modules():
            for name in _HOOKS:
                if getattr(module, name):
                    stack.enter_context(_silent(getattr(module, name)))
            if module.training:
                stack.callback(setattr, module, "training", True)
                module.training = False
            if module._buffers:
                stack.enter_context(_kept(module))
        yield


@contextmanager
def _silent(hooks: dict) -> Iterator[None]:
    before = dict(hooks)
    hooks.clear()
    try:
        yield
    finally:
        hooks.clear()
        hooks.update(before)


@contextmanager
def _kept(module: nn.Module) -> Iterator[None]:
    """Buffers, and the numbers that a module with buffers keeps beside them (a rotation: how long a sequence it was made for)."""
    buffers = {name: (buffer, _version(buffer), _copy(buffer)) for name, buffer in module._buffers.items()}
    numbers = {name: value for name, value in module.__dict__.items() if value is None or isinstance(value, bool | int | float)}
    try:
        yield
    finally:
        for name, (buffer, version, copy) in buffers.items():
            if _version(buffer) != version:
                if copy is None:
                    raise UnsupportedError(f"a forward of {type(module).__name__} changes its buffer {name!r} of packed weights")
                buffer.copy_(copy)
        module._buffers.clear()
        module._buffers.update({name: buffer for name, (buffer, _, _) in buffers.items()})
        module.__dict__.update(numbers)


def _version(buffer: Tensor | None) -> int:
    return 0 if buffer is None or buffer.is_inference() else buffer._version


def _copy(buffer: Tensor | None) -> Tensor | None:
    if buffer is None or buffer.is_inference() or (buffer.numel() > _COPIED and not buffer.is_floating_point()):
        return None
    return buffer.clone()

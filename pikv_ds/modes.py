"""The modes that torch keeps for a thread, and what a cache is run in whatever its caller has switched on.

A cache outlives the forward that made it. What is made under `torch.inference_mode()` can't be changed outside of it, what is made while a
graph is recorded would keep that graph alive, autocast would compute in another dtype than the pages', and torch.compile can't trace state
of Python. So the entries of a cache run outside of all these, and on the host's own device. Inputs may be inference tensors all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from pikv_ds.errors import UnsupportedError

P, R = ParamSpec("P"), TypeVar("R")

# Asked several times in every layer: by names of this file, as each dot costs as much as the answer.
_has_autocast, _has_device, _has_graph = torch._C._is_any_autocast_enabled, torch._C._len_torch_function_stack, torch.is_grad_enabled


def eager(function: Callable[P, R]) -> Callable[P, R]:
    """`function` outside of inference mode, autograd, autocast and default devices, never traced by torch.compile.

    Its results have no graph and are no inference tensors. Cost: some questions when no mode is on, about half a microsecond; leaving
    inference mode takes one more, and its ops are slower than those inside.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if is_dynamo_compiling():
            return _untraced(run)(*args, **kwargs)
        if torch.is_inference_mode_enabled():
            with torch._C._InferenceMode(False):  # what torch.inference_mode wraps, at a fifth of its time
                torch._C._set_grad_enabled(False)  # it comes with a graph; the end of the block restores both
                return inner(*args, **kwargs) if _has_autocast() or _has_device() else function(*args, **kwargs)
        if _has_graph() or _has_autocast() or _has_device():
            return inner(*args, **kwargs)
        return function(*args, **kwargs)

    inner = in_step(function)
    return run


def in_step(function: Callable[P, R]) -> Callable[P, R]:
    """As `eager`, but in its caller's inference mode: for what runs in every layer and makes nothing that outlives the forward, but for
    what is `lasting`."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if is_dynamo_compiling():
            return _untraced(run)(*args, **kwargs)
        if _has_autocast() or _has_device():
            with _no_other_mode():
                return function(*args, **kwargs)
        if _has_graph():
            with torch.no_grad():
                return function(*args, **kwargs)
        return function(*args, **kwargs)

    return run


def only_inference() -> bool:
    """No mode is on that `in_step` would leave, for who has nothing to run in that case."""
    return not (_has_graph() or _has_autocast() or _has_device())


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """`function` in its caller's modes, but never traced by torch.compile."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if is_dynamo_compiling():
            return _untraced(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return run


@eager
def lasting(x: Tensor) -> Tensor:
    """x, or a copy that can be changed outside of inference mode if x can't. Sync: none."""
    return x.clone() if x.is_inference() else x


def refuse_transforms() -> None:
    """What computes with a cache must be ordinary tensors: batches of functorch and dual numbers can't be stored."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise UnsupportedError(
            "a forward with a PiKV cache inside torch.func (grad, vmap, jvp, ...): its tensors stand for others and can't be stored; use "
            "loss.backward(), pass use_cache=False, or detach"
        )
    if torch.autograd.forward_ad._current_level >= 0:
        raise UnsupportedError(
            "a forward with a PiKV cache inside torch.autograd.forward_ad.dual_level(): stored entries have no tangents; use "
            "loss.backward(), pass use_cache=False, or detach"
        )


def without_autocast() -> ExitStack:
    """Ops inside run in the dtype of their inputs."""
    modes = ExitStack()
    if torch._C._is_any_autocast_enabled():
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                modes.enter_context(torch.autocast(device, enabled=False))
    return modes


def _no_other_mode() -> ExitStack:
    """No graph, and none of the modes that are rarely on: autocast, a default device."""
    modes = without_autocast()
    modes.enter_context(torch.no_grad())
    modes.enter_context(torch.device("cpu"))  # tensors made without a device are the host's
    return modes


@cache
def _untraced(function: Callable) -> Callable:
    """Made when it is needed: it imports the compiler."""
    return torch.compiler.disable(function)

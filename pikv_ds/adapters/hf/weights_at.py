"""Where a model's weights are when they are used, and in which dtype: offloaded ones (accelerate) lie elsewhere between forwards."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from pikv_ds.errors import UnsupportedError


def dtype_of(model: nn.Module) -> torch.dtype:
    """Of the first weight that is a number: packed ones are not."""
    weights = list(model.parameters())
    return next((weight.dtype for weight in weights if weight.is_floating_point()), weights[0].dtype)


def device_of(attentions: Iterable[nn.Module]) -> torch.device:
    """Where these run. Raises: UnsupportedError when they run on several devices, or their weights are nowhere."""
    attentions = list(attentions)
    found = {device for attention in attentions for module in attention.modules() for device in _devices(module)}
    if len(found) > 1:
        raise UnsupportedError(
            f"the attention layers of the model lie on several devices ({', '.join(sorted(map(str, found)))}); PiKV keeps one store on one "
            "device"
        )
    if not found:
        raise UnsupportedError(f"{type(attentions[0]).__name__} has no weights that say on which device it runs")
    return found.pop()


def _devices(module: nn.Module) -> Iterable[torch.device]:
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        yield _runs_on(module, tensor.device) if tensor.is_meta else tensor.device


def _runs_on(module: nn.Module, device: torch.device) -> torch.device:
    """Where accelerate brings an offloaded weight for a forward."""
    hook = getattr(module, "_hf_hook", None)
    for one in (hook, *getattr(hook, "hooks", ())):
        if getattr(one, "execution_device", None) is not None:
            return torch.device(one.execution_device)
    raise UnsupportedError(
        f"a {type(module).__name__} of the attention layers has weights on {device} and nothing that loads them (accelerate's hooks); load "
        "the model before it is attached"
    )

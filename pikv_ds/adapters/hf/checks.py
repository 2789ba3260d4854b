"""What attach refuses of a model before anything is hooked."""

from __future__ import annotations

import torch
import torch.distributed as dist

from pikv_ds.errors import ConfigError, UnsupportedError

from .weights_at import device_of

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_model(model, attentions, specs, dtype, group) -> None:
    """Raises: UnsupportedError, ConfigError."""
    name = type(model).__name__
    if dtype not in _DTYPES:
        legal = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES)
        raise UnsupportedError(f"{name} has parameters of dtype {dtype}; PiKV stores {legal}: convert the model with model.to(...)")
    device_of(attentions)
    if group is not None and not dist.is_initialized():
        raise ConfigError("a process group was given but torch.distributed is not initialised")

"""What a projection of an attention module computes: its weight where that says all, else what the module answers when it is called.

An adapter in a wrapper (PEFT), packed or quantised weights, a parametrised weight, a hook: there the weight is not the map.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from pikv_ds.errors import UnsupportedError


def is_plain(projection: nn.Module) -> bool:
    """Whether it computes x @ weight.T and nothing else, with a weight that lies here. Cost: a microsecond; asked in every forward."""
    if type(projection) is not nn.Linear or projection.bias is not None:
        return False
    weight = projection.weight
    hooks: tuple[Mapping, ...] = (projection._forward_hooks, projection._forward_pre_hooks)
    everywhere: tuple[Mapping, ...] = (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)
    return (
        type(weight) is nn.Parameter
        and weight.is_floating_point()
        and weight.dim() == 2  # under ZeRO-3 it lies elsewhere between calls
        and not weight.is_meta
        and "forward" not in projection.__dict__
        and not any(hooks)
        and not any(everywhere)
    )


def linear_map(projection: nn.Module, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[width, out]: the map of a linear module, found by calling it on the unit vectors, with whatever surrounds its weight.

    A module that is not linear answers all the same: compare its outputs with the map. Records a graph where one is recorded. Sync: none.
    Raises: UnsupportedError when it can't be called alone.
    """
    unit = torch.eye(width, dtype=dtype, device=device).view(1, 1, width, width)
    try:
        rows = projection(unit)
    except (RuntimeError, ValueError, TypeError) as error:
        raise UnsupportedError(
            f"{type(projection).__name__} can't be called on {width} unit vectors, by which PiKV learns what it computes ({error}); merge "
            "what it adds into its weight, or use the host's own cache"
        ) from error
    return rows.view(width, -1).to(dtype)

"""Tensor-parallel peers must run the same tokens: each computes a part of every layer. DeepSpeed's init_inference does not look, and with
other tokens on a peer every rank gives the same wrong text, or waits for ever.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.module_inject.layers import TensorParallel_Layer
from torch import nn
from torch.utils.hooks import RemovableHandle

from pikv_ds.errors import DivergedError
from pikv_ds.exchange.digest import digest

_INPUTS = ("input_ids", "inputs_embeds", "attention_mask")


def check_inputs_of_peers(model: nn.Module) -> RemovableHandle | None:
    """Compare them, one small collective, whenever a forward begins a text in eval mode; steps that continue one are not looked at.

    Returns: what takes the hook away; None where nothing is cut. The hook raises: DivergedError, on all peers. Sync: it reads the device.
    """
    group = next((module.mp_group for module in model.modules() if isinstance(module, TensorParallel_Layer) and module.mp_group), None)
    if group is None or dist.get_world_size(group) == 1:
        return None

    def check(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values", kwargs.get("cache"))
        if module.training or (cache is not None and cache.get_seq_length()):
            return
        given = ([args[0]] if args else []) + [kwargs[name] for name in _INPUTS if kwargs.get(name) is not None]
        tensors = [each for each in given if isinstance(each, torch.Tensor)]
        if tensors:
            _compare(tensors, group)

    return model.register_forward_pre_hook(check, with_kwargs=True)


def _compare(tensors: list[torch.Tensor], group: dist.ProcessGroup) -> None:
    shape = (*tensors[0].shape[:2], 0)[:2]
    own = torch.tensor([*shape, digest(tensors)], device=tensors[0].device)
    rows = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, own, group=group)
    told = torch.stack(rows).tolist()
    if any(other != told[0] for other in told):
        ranks = dist.get_process_group_ranks(group)
        shapes = ", ".join(f"rank {rank} {row[:2]}" for rank, row in zip(ranks, told, strict=True))
        raise DivergedError(
            f"tensor-parallel peers were given different tokens or masks (rows and columns: {shapes}); each computes a part of every "
            f"layer, so give all of them the same, for example broadcast from rank {ranks[0]}"
        )

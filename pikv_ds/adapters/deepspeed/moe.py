"""Models whose MLPs were replaced by deepspeed.moe.layer.MoE: the group that their experts are sharded over."""

from __future__ import annotations

import torch.distributed as dist
from deepspeed.moe.layer import MoE
from torch import nn

from pikv_ds.errors import ConfigError, UnsupportedError


def check_moe_layers(model: nn.Module, num_ranks: int) -> int | None:
    """The ep_size of the model's DeepSpeed MoE layers, None when it has none or every rank holds all experts (ep_size 1).

    Raises: UnsupportedError, ConfigError before DeepSpeed runs.
    """
    layers = _moe_layers(model)
    sizes = {layer.ep_size for layer in layers.values()}
    if len(sizes) > 1:
        raise UnsupportedError(
            f"the DeepSpeed MoE layers have different ep_size: { {name: layer.ep_size for name, layer in layers.items()} }; "
            f"PiKV shards one cache over one group, give all layers the same ep_size"
        )
    ep_size = next(iter(sizes), 1)
    if num_ranks % ep_size:
        raise ConfigError(f"the DeepSpeed MoE layers have ep_size {ep_size} and the job {num_ranks} rank(s), which it must divide")
    tensor_parallel = [name for name, layer in layers.items() if layer.enable_expert_tensor_parallelism]
    if tensor_parallel:
        raise UnsupportedError(f"{tensor_parallel[0]} has enable_expert_tensor_parallelism; PiKV needs whole experts, build it without")
    return ep_size if ep_size > 1 else None


def open_groups(model: nn.Module) -> None:
    """Give MoE layers their expert-parallel group. `initialize` does so itself; `init_inference` of DeepSpeed 0.19.8 makes the groups and
    hands them to no layer, whose first forward on several ranks then fails."""
    for layer in _moe_layers(model).values():
        if layer.ep_size > 1 and layer.deepspeed_moe.ep_group is None:
            layer.set_deepspeed_parallelism()


def moe_group_members(model: nn.Module) -> tuple[int, ...]:
    """Global ranks of the expert-parallel group of the MoE layers: rank r of it holds the experts r * E / ep_size and following."""
    members = {tuple(dist.get_process_group_ranks(layer.deepspeed_moe.ep_group)) for layer in _moe_layers(model).values()}
    if len(members) != 1:
        raise UnsupportedError(f"the DeepSpeed MoE layers disagree on their expert-parallel group: {sorted(members)}; PiKV needs one")
    return members.pop()


def _moe_layers(model: nn.Module) -> dict[str, MoE]:
    return {name: module for name, module in model.named_modules() if isinstance(module, MoE)}

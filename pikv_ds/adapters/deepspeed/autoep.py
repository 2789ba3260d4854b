"""AutoEP, DeepSpeed's expert parallelism: check its block before it runs, find its group after."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from deepspeed.module_inject.auto_ep import AutoEP
from deepspeed.module_inject.auto_ep_config import AutoEPConfig, parse_autoep_config
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.module_inject.auto_ep_presets.registry import available_preset_names
from torch import nn

from pikv_ds.errors import ConfigError, UnsupportedError

LEGAL_KEYS = tuple(field.name for field in dataclasses.fields(AutoEPConfig) if not field.name.startswith("_"))


def check_expert_parallel(ds_config: Mapping[str, Any], model: nn.Module) -> int | None:
    """The autoep_size if AutoEP is enabled and can serve this model, None if it is not enabled.

    Runs AutoEP's own detection on the unchanged model, so everything it would skip silently is an error here.
    """
    block = ds_config.get("expert_parallel")
    if block is None:
        return None
    if not isinstance(block, Mapping):
        raise ConfigError(f"expert_parallel = {block!r}: legal is an object with the keys {', '.join(LEGAL_KEYS)}")
    unknown = [key for key in block if key not in LEGAL_KEYS]
    if unknown:
        raise ConfigError(
            f"expert_parallel has the unknown key {unknown[0]!r}, which DeepSpeed would ignore; legal: {', '.join(LEGAL_KEYS)}"
        )
    if not block.get("enabled", False):
        return None
    autoep = parse_autoep_config(dict(block))
    _check_world(autoep.autoep_size)
    # A copy: the detection fills the configuration in from the model.
    specs = AutoEP(model, copy.copy(autoep)).ep_parser()
    if not specs:
        raise UnsupportedError(_no_preset(model))
    for spec in specs:
        if spec.num_experts % autoep.autoep_size:
            divisors = [size for size in range(1, spec.num_experts + 1) if spec.num_experts % size == 0]
            raise ConfigError(
                f"expert_parallel.autoep_size is {autoep.autoep_size} and {spec.moe_module_name} has "
                f"{spec.num_experts} experts, which it does not divide; legal: {divisors}"
            )
    return autoep.autoep_size


def expert_group_members(model: nn.Module) -> tuple[int, ...]:
    """Global ranks of the expert-parallel group that all AutoEP layers of the model share."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, AutoEPMoELayer)}
    if not layers:
        raise UnsupportedError(_no_preset(model))
    members_of = {name: _layer_members(layer) for name, layer in layers.items()}
    if len(set(members_of.values())) > 1:
        raise UnsupportedError(
            f"the AutoEP layers disagree on their expert-parallel group: {members_of}; PiKV needs one group for the whole model"
        )
    for name, layer in layers.items():
        _check_contiguous(name, layer)
    return next(iter(members_of.values()))


def _layer_members(layer: AutoEPMoELayer) -> tuple[int, ...]:
    if layer.ep_group is None:
        return (dist.get_rank(),)
    return tuple(dist.get_process_group_ranks(layer.ep_group))


def _check_contiguous(name: str, layer: AutoEPMoELayer) -> None:
    """Placement `experts` homes entries by expert // num_local_experts, which is how AutoEP dispatches."""
    placed = {entry["rank"]: list(entry["experts"]) for entry in layer.expert_placement_descriptor["ranks"]}
    count = layer.num_local_experts
    expected = {rank: list(range(rank * count, (rank + 1) * count)) for rank in range(layer.ep_size)}
    if placed != expected:
        raise UnsupportedError(
            f"{name} places its experts as {placed}; PiKV follows AutoEP's contiguous placement "
            f"{expected}. Use storage.placement 'table' with replicated experts instead"
        )


def _check_world(autoep_size: Any) -> None:
    world_size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    if not isinstance(autoep_size, int) or autoep_size < 1 or world_size % autoep_size:
        raise ConfigError(
            f"expert_parallel.autoep_size is {autoep_size!r} and the job has {world_size} rank(s); it "
            f"must be a positive divisor of them: change the key or the number of ranks"
        )


def _no_preset(model: nn.Module) -> str:
    return (
        f"expert_parallel is enabled and AutoEP finds no expert layer in model type {model.config.model_type!r}: "
        f"it has no preset for it (presets: {', '.join(available_preset_names())}). Drop the expert_parallel block "
        f"to run with replicated experts, the KV cache is sharded over the data-parallel ranks all the same; or "
        f"describe the layers with expert_parallel.moe_layer_pattern"
    )

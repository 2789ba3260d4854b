"""AutoEP, DeepSpeed's expert parallelism: check its block before it runs, find its group after."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import os
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import deepspeed
import torch.distributed as dist
from torch import nn

from pikv_ds.errors import ConfigError, UnsupportedError


def check_expert_parallel(ds_config: Mapping[str, Any], model: nn.Module) -> int | None:
    """The autoep_size if AutoEP is enabled and can serve this model, None if it is not enabled.

    Runs AutoEP's own detection on the unchanged model, so everything it would skip silently is an error here.
    """
    block = ds_config.get("expert_parallel")
    if block is None:
        return None
    host, legal = _autoep("auto_ep_config"), legal_keys()
    if not isinstance(block, Mapping):
        raise ConfigError(f"expert_parallel = {block!r}: legal is an object with the keys {', '.join(legal)}")
    unknown = [key for key in block if key not in legal]
    if unknown:
        raise ConfigError(
            f"expert_parallel has the unknown key {unknown[0]!r}, which deepspeed {deepspeed.__version__} would ignore; "
            f"legal: {', '.join(legal)}"
        )
    if not block.get("enabled", False):
        return None
    autoep = host.parse_autoep_config(dict(block))
    _check_world(autoep.autoep_size)
    # A copy: the detection fills the configuration in from the model.
    specs = _autoep("auto_ep").AutoEP(model, copy.copy(autoep)).ep_parser()
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


def legal_keys() -> list[str]:
    """Of the "expert_parallel" block, in this DeepSpeed."""
    return [field.name for field in dataclasses.fields(_autoep("auto_ep_config").AutoEPConfig) if not field.name.startswith("_")]


def expert_group_members(model: nn.Module) -> tuple[int, ...]:
    """Global ranks of the expert-parallel group that all AutoEP layers of the model share."""
    layers = _layers(model)
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


def autoep_layers(model: nn.Module) -> list[nn.Module]:
    """In the order of the model."""
    return list(_layers(model).values())


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    kind = _autoep("auto_ep_layer").AutoEPMoELayer
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def _layer_members(layer: nn.Module) -> tuple[int, ...]:
    if layer.ep_group is None:
        return (dist.get_rank(),)
    return tuple(dist.get_process_group_ranks(layer.ep_group))


def _check_contiguous(name: str, layer: nn.Module) -> None:
    """Placement `experts` homes entries by expert // num_local_experts, which is how AutoEP dispatches."""
    placed, count = _placed(layer), layer.num_local_experts
    expected = {rank: list(range(rank * count, (rank + 1) * count)) for rank in placed}
    if placed != expected:
        raise UnsupportedError(
            f"{name} places its experts as {placed}; PiKV follows AutoEP's contiguous placement "
            f"{expected}. Use storage.placement 'table' with replicated experts instead"
        )


def _placed(layer: nn.Module) -> dict[int, list[int]]:
    """Experts by rank of the group: of all ranks where the layer has a descriptor, which came with DeepSpeed 0.19.8.

    Before that AutoEP cut the experts in one way, the slice of length num_local_experts that begins at ep_rank * num_local_experts
    (moe/ep_repack.py), and sent tokens to rank expert // num_local_experts. What may differ is ep_rank: it must be the rank in the group.
    """
    descriptor = getattr(layer, "expert_placement_descriptor", None)
    if descriptor is not None:
        return {entry["rank"]: list(entry["experts"]) for entry in descriptor["ranks"]}
    count, rank = layer.num_local_experts, 0 if layer.ep_group is None else dist.get_rank(layer.ep_group)
    return {rank: list(range(layer.ep_rank * count, (layer.ep_rank + 1) * count))}


def _autoep(module: str) -> ModuleType:
    """A module of AutoEP. Raises: UnsupportedError where this DeepSpeed has none."""
    name = f"deepspeed.module_inject.{module}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise UnsupportedError(
            f"the configuration has an expert_parallel block and deepspeed {deepspeed.__version__} has no {name}: AutoEP came with 0.19.2. "
            f"Install a later DeepSpeed, or drop the block to run with replicated experts: the KV cache is sharded all the same"
        ) from error


def _check_world(autoep_size: Any) -> None:
    world_size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    if not isinstance(autoep_size, int) or autoep_size < 1 or world_size % autoep_size:
        raise ConfigError(
            f"expert_parallel.autoep_size is {autoep_size!r} and the job has {world_size} rank(s); it "
            f"must be a positive divisor of them: change the key or the number of ranks"
        )


def _no_preset(model: nn.Module) -> str:
    presets = _autoep("auto_ep_presets.registry").available_preset_names()
    return (
        f"expert_parallel is enabled and AutoEP finds no expert layer in model type {model.config.model_type!r}: "
        f"it has no preset for it (presets: {', '.join(presets)}). Drop the expert_parallel block "
        f"to run with replicated experts, the KV cache is sharded over the data-parallel ranks all the same; or "
        f"describe the layers with expert_parallel.moe_layer_pattern"
    )

"""Attach an expert-sharded cache to a transformers model, by hooks and one registered attention function. No model file is edited."""

from __future__ import annotations

import inspect

import torch
import torch.distributed as dist
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from pikv_ds.adapters.penalty import RouterPenalty
from pikv_ds.blueprint.routing import check_has_experts
from pikv_ds.cache.cache import PiKVCache
from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.errors import ConfigError, UnsupportedError

from . import binding as bindings
from .attention import pikv_attention, pikv_mask
from .cache import HFCache
from .expert_ids import ExpertIds, count_experts, load_gate
from .fingerprint import check_calibration
from .forward_hooks import ForwardHooks
from .generate_hooks import GenerateHooks
from .host_penalty import HostPenalty
from .model_spec import read_model_spec
from .rotation import check_rotations
from .router_output import check_gates, count_gate_experts, find_router

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def attach(model: PreTrainedModel, config=None, group: dist.ProcessGroup | None = None, *, requests: str | None = None) -> HFCache:
    """Keep the KV cache of `model` in an expert-sharded store over `group`, until detach() or the end of the `with` block.

    Args:
        model: a decoder of transformers, in eval or train mode; forwards in train mode are left to the host.
        config: the "pikv" block: PiKVConfig, dict, JSON path, or None for the defaults.
        group: the expert-parallel process group (any backend); None = one rank, no communication.
        requests: overrides config.storage.requests.

    Returns:
        HFCache, a transformers Cache and context manager with stats(), reset(), lockstep(), detach().

    Raises:
        ConfigError: a key that does not fit this model or this group.
        UnsupportedError: a layer type, dtype or attention that PiKV cannot honour exactly.

    Collectives: none, but for a penalty on gates that need them (HostPenalty). The group must have been created; its own timeout bounds
        NCCL, pikv.timeout_s bounds gloo.
    """
    config = PiKVConfig.parse(config)
    if not config.enabled:
        raise ConfigError("pikv.enabled is false: attach would have no effect; drop the call or enable the block")
    if requests is not None:
        config = config.model_copy(update={"storage": config.storage.model_copy(update={"requests": requests})})
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedError(f"attach needs a transformers PreTrainedModel, got {type(model).__name__}; for an engine pass engine.module")
    specs = read_model_spec(model.config)
    decoder, layers, attentions = _anatomy(model)
    parameter = next(model.parameters())
    _check(model, attentions, specs, parameter.dtype, group)
    num_ranks = 1 if group is None else dist.get_world_size(group)
    num_shards = config.storage.num_shards or num_ranks
    text = model.config.get_text_config(decoder=True)
    routers = [find_router(layer) for layer in layers]
    check_gates(routers, num_ranks, config.storage.requests)
    num_experts = count_gate_experts(routers) or count_experts(text)
    placed_experts = num_experts or num_shards
    gate = None
    if config.storage.expert_ids == "gate":
        gate = load_gate(config.storage.gate_path, len(specs), placed_experts, specs[0].num_kv_heads * specs[0].k_dim).to(parameter.device)
    core = PiKVCache(specs, config, num_experts=placed_experts, dtype=parameter.dtype, device=parameter.device, group=group)
    check_has_experts(core.blueprint.router, num_experts, type(model).__name__)
    check_calibration(core, attentions)
    check_rotations(model, specs, core.rotations)
    cache = HFCache(core)
    penalty = RouterPenalty.named(config.routing.host_penalty)
    if penalty is not None:  # its hooks come first: entry homes follow the routers' final choice
        penalty = HostPenalty(penalty, core, routers, text.hidden_size, type(model).__name__)
    cache.penalty = penalty
    expert_ids = ExpertIds(config.storage.expert_ids, routers, attentions, gate, penalty)
    expert_ids.on_routed = core.name_experts
    AttentionInterface.register("pikv", pikv_attention)
    AttentionMaskInterface.register("pikv", pikv_mask)
    forward = ForwardHooks(model, decoder, cache, expert_ids)
    for i, attention in enumerate(attentions):
        bindings.bind(attention, bindings.Binding(cache, i, specs[i], expert_ids, forward.chunk))
    generate = GenerateHooks(model, cache)

    def undo() -> None:
        generate.remove()
        forward.remove()
        expert_ids.remove()
        if penalty is not None:
            penalty.remove()
        for attention in attentions:
            bindings.unbind(attention)

    cache._detach = undo
    return cache


def find_attentions(model: nn.Module) -> list[nn.Module]:
    """The attention modules of the decoder's layers, in order. Raises: UnsupportedError."""
    return _anatomy(model)[2]


def _anatomy(model: nn.Module) -> tuple[nn.Module, list[nn.Module], list[nn.Module]]:
    """The decoder (the module whose forward takes past_key_values and loops over layers), its layers, their attention modules."""
    for module in model.modules():
        layers = next((found for name in ("layers", "h") if isinstance(found := getattr(module, name, None), nn.ModuleList)), None)
        if layers is not None and "past_key_values" in inspect.signature(module.forward).parameters:
            return module, list(layers), [_attention_of(layer, i) for i, layer in enumerate(layers)]
    raise UnsupportedError(f"{type(model).__name__} has no decoder with a list of layers whose forward takes past_key_values")


def _attention_of(layer: nn.Module, layer_idx: int) -> nn.Module:
    found = [m for m in layer.modules() if getattr(m, "layer_idx", None) == layer_idx and "attention" in type(m).__name__.lower()]
    if len(found) != 1:
        raise UnsupportedError(
            f"{type(layer).__name__} {layer_idx} has {len(found)} attention modules that know their layer_idx; "
            "PiKV needs exactly one per layer"
        )
    return found[0]


def _check(model, attentions, specs, dtype, group) -> None:
    name = type(model).__name__
    if not model._can_set_attn_implementation():
        raise UnsupportedError(
            f"{name} does not call its attention through transformers' AttentionInterface; its attention can't be replaced"
        )
    if bindings.is_bound(attentions[0]):
        raise UnsupportedError(f"{name} is attached already; detach() the first cache before attaching another")
    if dtype not in _DTYPES:
        legal = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES)
        raise UnsupportedError(f"{name} has parameters of dtype {dtype}; PiKV stores {legal}: convert the model with model.to(...)")
    devices = sorted({str(p.device) for attention in attentions for p in attention.parameters()})
    if len(devices) > 1:
        raise UnsupportedError(
            f"the attention layers of {name} lie on several devices ({', '.join(devices)}); PiKV keeps one store on one device"
        )
    if len(specs) != len(attentions):
        raise UnsupportedError(f"the configuration of {name} describes {len(specs)} layers, the model has {len(attentions)}")
    if getattr(model.config.get_text_config(decoder=True), "attn_logit_softcapping", None):
        raise UnsupportedError(f"{name} caps attention logits (attn_logit_softcapping); PiKV does not handle softcap")
    if group is not None and not dist.is_initialized():
        raise ConfigError("a process group was given but torch.distributed is not initialised")

"""Attach an expert-sharded cache to a transformers model, by hooks and one registered attention function. No model file is edited."""

from __future__ import annotations

import torch.distributed as dist
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from pikv_ds.adapters.penalty import RouterPenalty
from pikv_ds.blueprint.routing import check_has_experts
from pikv_ds.cache.cache import PiKVCache
from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.errors import ConfigError, UnsupportedError

from . import binding as bindings
from .anatomy import anatomy
from .attention import pikv_attention, pikv_mask
from .cache import HFCache
from .checks import check_model
from .expert_ids import ExpertIds, count_experts, load_gate
from .fingerprint import check_calibration
from .forward_hooks import ForwardHooks
from .generate_hooks import GenerateHooks
from .host_penalty import HostPenalty
from .model_spec import read_model_spec
from .rotation import check_rotations
from .router_output import check_gates, count_gate_experts, find_router


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
    decoder, layers, attentions = anatomy(model)
    parameter = next(model.parameters())
    check_model(model, attentions, specs, parameter.dtype, group)
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

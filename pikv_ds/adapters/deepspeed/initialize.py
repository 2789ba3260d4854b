"""deepspeed.initialize and deepspeed.init_inference with the "pikv" block.

Without the block, or with pikv.enabled false, the call goes to DeepSpeed as it came and nothing is patched.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from pikv_ds.adapters.hf.attach import attach
from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.ops.build.torch_builds import locks_watched

from .alike import check_inputs_of_peers
from .autoep import check_expert_parallel, expert_group_members
from .autoep_shim import registry_shim
from .autotp import check_inference_tp, check_initialize_tp, equal_parts, fit_requests, hide_cache_from_check, tensor_parallel_peers
from .config import inference_block, inference_config, initialize_config, pikv_config, without_block
from .experts import experts_of
from .groups import own_group
from .install import host_function, replace, restore
from .moe import check_moe_layers, moe_group_members, open_groups
from .monitor import MonitorWriter
from .refusals import check_inference, check_initialize, check_model
from .register import register, unregister
from .shm import unlink_own_buffers


def initialize(*args: Any, **kwargs: Any) -> tuple:
    """deepspeed.initialize; with the block, the returned engine has the KV cache handle as `engine.pikv`.

    The cache is sharded over AutoEP's expert-parallel group ("expert_parallel" block), over that of DeepSpeed's own MoE layers, or,
    with replicated experts, over all data-parallel ranks: under AutoTP those that hold the same heads. Inference needs no optimizer.

    Args and returns: those of deepspeed.initialize.

    Raises:
        ConfigError: the block, or the expert_parallel block beside it, is not legal.
        UnsupportedError: the model, or a DeepSpeed feature that is on, cannot be served exactly.
    """
    host = host_function("initialize")
    call = inspect.signature(host).bind(*args, **kwargs).arguments
    ds_config = initialize_config(call)
    config = pikv_config(ds_config)
    if config is None:
        return host(*args, **kwargs)
    model = call.get("model")
    check_model(model)
    check_initialize(ds_config, model, call.get("mpu"))
    autoep_size = check_expert_parallel(ds_config, model)
    moe_size = check_moe_layers(model, _world_size())
    check_initialize_tp(ds_config, model, autoep_size, moe_size)
    register()
    with locks_watched(), registry_shim() if autoep_size else contextlib.nullcontext():
        returned = host(*args, **kwargs)
    engine = returned[0]
    if autoep_size:
        _add_cache(engine, config, expert_group_members(engine.module), "ep_size")
        engine.pikv.owner.follow(experts_of(engine, config, engine.pikv.owner.group))
    elif moe_size:
        _add_cache(engine, config, moe_group_members(engine.module), "ep_size")
    else:
        _add_cache(engine, config, None, "dp_size")
    return returned


def init_inference(model: Any, config: str | dict | None = None, **kwargs: Any) -> deepspeed.InferenceEngine:
    """deepspeed.init_inference; with the block, the returned engine has the KV cache handle as `engine.pikv`.

    Experts are replicated (DeepSpeed shards no Hugging Face experts here) and the cache is sharded over all ranks, under AutoTP
    (tensor_parallel.tp_size) over those that hold the same heads; with DeepSpeed's own MoE layers of ep_size > 1 over their group, which
    they are given here.
    torch.distributed is initialised if the launcher started more than one rank and the script has not done it.

    Args and returns: those of deepspeed.init_inference, which does not get to see the block.

    Raises: as `initialize`.
    """
    host = host_function("init_inference")
    ds_config = inference_config(config)
    block = inference_block(ds_config, kwargs)
    pikv = pikv_config(block or ds_config)
    if not block:
        return host(model, config, **kwargs)
    # The host refuses keys it does not know, and updates the dict it is given: it gets a copy.
    ds_config, kwargs = without_block(ds_config), without_block(kwargs)
    if pikv is None:
        return host(model, ds_config, **kwargs)
    check_model(model)
    check_inference({**(ds_config or {}), **kwargs})
    moe_size = check_moe_layers(model, _world_size())
    check_inference_tp({**(ds_config or {}), **kwargs}, model, _world_size(), moe_size)
    register()
    with locks_watched():
        _init_distributed(pikv.timeout_s)
        engine = host(model, ds_config, **kwargs)
    if moe_size:
        open_groups(engine.module)
        _add_cache(engine, pikv, moe_group_members(engine.module), "ep_size")
    else:
        _add_cache(engine, pikv, None, "dp_size")
    return engine


def install() -> None:
    """Make scripts that call deepspeed.initialize or deepspeed.init_inference honour the block. Idempotent.

    Call it before a script does `from deepspeed import initialize`: a name bound earlier is not reached.
    """
    replace({"initialize": initialize, "init_inference": init_inference})
    register()


def uninstall() -> None:
    """Undo install(), and the registration of the ops by any engine. Engines that exist keep their cache until `engine.pikv.detach()`."""
    restore()
    unregister()


def _add_cache(engine: Any, config: PiKVConfig, members: Sequence[int] | None, name: str) -> None:
    """members: global ranks over which the cache is sharded; None = all that hold the same part of the model."""
    peers = tensor_parallel_peers(engine.module)
    members = equal_parts(peers) if members is None else members
    group = own_group(members, config.timeout_s)
    unlink_own_buffers()  # own_group has heard of all ranks: each has them mapped
    engine.pikv = attach(engine.module, fit_requests(config, members, peers), group)
    hide_cache_from_check(engine)
    hook = check_inputs_of_peers(engine.module)
    if hook is not None:
        engine.pikv.owner.hooks.append(hook)
    _note_steps(engine)
    group_name = f"{name}_{len(members)}"
    # Both answers come from the configuration, so all ranks agree on making the writer's collective.
    monitor = getattr(engine, "monitor", None)
    if config.monitor.enabled and monitor is not None and monitor.enabled:
        writer = MonitorWriter(monitor, engine.pikv, group, group_name, config.monitor.interval, config.timeout_s)
        engine.pikv.end_of_step_callbacks.append(writer)


def _note_steps(engine: Any) -> None:
    """What is kept of finished requests is void after a step. ZeRO writes weights past torch's version counters, and not all train in
    train mode."""
    optimizer, host = getattr(engine, "basic_optimizer", None), engine.pikv.owner.host
    if isinstance(optimizer, torch.optim.Optimizer):
        engine.pikv.owner.hooks.append(optimizer.register_step_post_hook(lambda *_: host.stepped()))


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def _init_distributed(timeout_s: float) -> None:
    if dist.is_initialized() or _world_size() == 1:
        return
    get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", "0")))
    deepspeed.init_distributed(timeout=timedelta(seconds=timeout_s))

"""AutoTP, DeepSpeed's tensor parallelism: what it may do to a model, which ranks it makes peers, and over which the cache is then sharded.

Every rank stores the KV heads that it computes. Tensor-parallel peers see the same tokens and hold other heads, so to the store they are
never the same request: either they are in different groups, or they are distinct requests of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from deepspeed import InferenceEngine
from deepspeed.module_inject.layers import TensorParallel_Layer
from torch import nn
from transformers import PreTrainedModel

from pikv_ds.adapters.hf.cache import HFCache
from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.errors import ConfigError, UnsupportedError

from .config import nested
from .groups import all_ranks


def check_initialize_tp(ds_config: Mapping[str, Any], model: PreTrainedModel, autoep_size: int | None, moe_size: int | None) -> None:
    """Raises: UnsupportedError, before DeepSpeed runs, for tensor parallelism under `initialize` that PiKV can't follow."""
    size = _size("tensor_parallel.autotp_size", nested(ds_config, "tensor_parallel", "autotp_size"))
    if size > 1:
        _check_model(model, size, "tensor_parallel.autotp_size", moe_size)
        heads = _kv_heads(model)
        if autoep_size and heads % size:
            raise UnsupportedError(
                f"tensor_parallel.autotp_size is {size} beside an expert_parallel block, and the model has {heads} KV heads: ranks of one "
                f"expert-parallel group would hold different numbers of heads; choose a size that divides {heads}"
            )


def check_inference_tp(ds_config: Mapping[str, Any], model: PreTrainedModel, num_ranks: int, moe_size: int | None) -> None:
    """The same under `init_inference`, which knows the size by several names, and a layout of the user's by its `mpu`."""
    blocks = ("tensor_parallel", "tp")
    named = {f"{block}.tp_size": nested(ds_config, block, "tp_size") for block in blocks} | {"mp_size": ds_config.get("mp_size")}
    key, size = max(((key, _size(key, size)) for key, size in named.items()), key=lambda item: item[1])
    mpu = next((found for block in blocks if (found := nested(ds_config, block, "mpu")) is not None), ds_config.get("mpu"))
    if mpu is not None:
        group = next((found for block in blocks if (found := nested(ds_config, block, "tp_group")) is not None), None)
        if not hasattr(mpu, "get_model_parallel_group") or group is None:
            raise UnsupportedError(
                f"mpu is set (a {type(mpu).__name__}): DeepSpeed takes the size from its get_model_parallel_group() and cuts nothing "
                f"unless tensor_parallel.tp_group is that group too; pass both, or neither"
            )
        key, size = "mpu.get_model_parallel_group()", dist.get_world_size(mpu.get_model_parallel_group())
    if size <= 1:
        return
    _check_model(model, size, key, moe_size)
    if mpu is not None:
        return
    if size != num_ranks:
        raise UnsupportedError(
            f"{key} is {size} and the job has {num_ranks} ranks: init_inference makes one tensor-parallel group, of ranks 0 to {size - 1}, "
            f"and gives the others none; start {size} ranks, or pass tensor_parallel.mpu and tensor_parallel.tp_group with the group of "
            f"each rank"
        )
    first = InferenceEngine.inference_mp_group
    if first is not None and dist.get_world_size(first) != size:
        raise UnsupportedError(
            f"{key} is {size}, and DeepSpeed keeps the tensor-parallel group of this process's first engine, of "
            f"{dist.get_world_size(first)} ranks, for all that follow; use one size in a process"
        )


def tensor_parallel_peers(model: nn.Module) -> tuple[int, ...]:
    """Global ranks over which AutoTP has cut this model, in the order of its parts; this rank alone where nothing is cut."""
    own = (dist.get_rank() if dist.is_initialized() else 0,)
    found = {
        tuple(dist.get_process_group_ranks(module.mp_group))
        for module in model.modules()
        if isinstance(module, TensorParallel_Layer) and module.mp_group is not None
    }
    if len(found) > 1:
        raise UnsupportedError(f"the layers that AutoTP has cut disagree on their ranks: {sorted(found)}; PiKV needs one group")
    return found.pop() if found else own


def equal_parts(peers: Sequence[int]) -> tuple[int, ...]:
    """Ranks that hold the same part of the model as this one, itself included: data-parallel ranks. Collective over the job."""
    ranks = all_ranks()
    if not dist.is_initialized():
        return ranks
    part = list(peers).index(dist.get_rank())
    parts: list = [None] * len(ranks)
    dist.all_gather_object(parts, part)
    return tuple(rank for rank, other in zip(ranks, parts, strict=True) if other == part)


def fit_requests(config: PiKVConfig, members: Sequence[int], peers: Sequence[int]) -> PiKVConfig:
    """storage.requests is "distinct" where the group of the cache holds tensor-parallel peers: their keys are different heads.

    Raises: ConfigError when the block says otherwise.
    """
    shared = sorted(set(members) & set(peers))
    if len(shared) < 2:
        return config
    if config.storage.requests == "replicated":
        raise ConfigError(
            f"pikv.storage.requests = 'replicated' and the cache is sharded over ranks {list(members)}, of which {shared} are "
            f"tensor-parallel peers, whose keys are different heads; use 'auto' or 'distinct'"
        )
    return config.model_copy(update={"storage": config.storage.model_copy(update={"requests": "distinct"})})


def hide_cache_from_check(engine: Any) -> None:
    """In the first forward under AutoTP `initialize` compares the inputs of tensor-parallel peers by pickling them, which a cache of PiKV
    refuses. DeepSpeed's own hook stays and is shown the inputs without the cache. Nothing happens where there is no such hook."""
    handle = getattr(engine, "first_dataloader_check", None)
    if handle is None:
        return
    check = engine.module._forward_pre_hooks[handle.id]

    def without_cache(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        check(module, args, {name: value for name, value in kwargs.items() if not isinstance(value, HFCache)})

    handle.remove()
    # Where DeepSpeed looks for the handle to remove it by, after the check.
    engine.first_dataloader_check = engine.module.register_forward_pre_hook(without_cache, prepend=True, with_kwargs=True)


def _size(key: str, given: Any) -> int:
    """As DeepSpeed reads it, also from a string of digits; 1 where nothing or 0 is given."""
    try:
        return int(given or 1)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key} is {given!r}; legal is a number of ranks") from error


def _check_model(model: PreTrainedModel, size: int, key: str, moe_size: int | None) -> None:
    name, heads = type(model).__name__, _kv_heads(model)
    cut = next((path for path, module in model.named_modules() if isinstance(module, TensorParallel_Layer) and module.mp_group), None)
    if cut is not None:
        raise UnsupportedError(
            f"{key} is {size} and an earlier engine has cut this {name} already ({cut} is a "
            f"{type(model.get_submodule(cut)).__name__}): DeepSpeed cuts a model once; use that engine, or load the model anew"
        )
    if heads < size:
        raise UnsupportedError(
            f"{key} is {size} and {name} has {heads} KV heads: DeepSpeed cuts whole heads, so some ranks would have none"
        )
    sinks = next((path for path, _ in model.named_parameters() if path.endswith(".sinks")), None)
    if sinks is not None:
        raise UnsupportedError(
            f"{key} is {size} and {name} has attention sinks ({sinks}), one number per query head, which DeepSpeed leaves whole on every "
            f"rank: its own forward fails on them; use expert or data parallelism"
        )
    if moe_size:
        raise UnsupportedError(
            f"{key} is {size} and the model has DeepSpeed MoE layers of ep_size {moe_size}: their experts would be cut besides; use one "
            f"of both"
        )


def _kv_heads(model: PreTrainedModel) -> int:
    """By which DeepSpeed cuts projections: those of the configuration, also where a latent is stored."""
    text = model.config.get_text_config(decoder=True)
    return getattr(text, "num_key_value_heads", None) or text.num_attention_heads

"""Over which ranks the entries of a Megatron-Core model are sharded: its expert-parallel group."""

from __future__ import annotations

import torch.distributed as dist
from megatron.core import parallel_state

from pikv_ds.config import PiKVConfig
from pikv_ds.errors import ConfigError, UnsupportedError

from .layers import Layer


def expert_group(layers: list[Layer]) -> dist.ProcessGroup | None:
    """The expert-parallel group of the model's MoE layers, or of parallel_state for a dense model; None when it has one rank."""
    if not dist.is_initialized():
        return None
    group = next((layer.moe.ep_group for layer in layers if layer.moe is not None), None)
    if group is None:
        group = getattr(layers[0].attention.pg_collection, "ep", None) or parallel_state.get_expert_model_parallel_group(check_initialized=False)
    if group is None:
        raise UnsupportedError(
            "no expert-parallel process group: the model's pg_collection has no 'ep' and parallel_state is not initialised; call "
            "parallel_state.initialize_model_parallel(expert_model_parallel_size=...) or give pg_collection its 'ep'"
        )
    return group if group.size() > 1 else None


def fit_requests(config: PiKVConfig, layers: list[Layer], group: dist.ProcessGroup | None) -> PiKVConfig:
    """Decide storage.requests where the layout leaves no choice, and check the number of shards.

    Tensor-parallel peers in one expert group see the same tokens but hold different heads: to the store they are distinct requests,
    keyed by their rank, so each head's entry is stored once.
    """
    num_ranks = 1 if group is None else group.size()
    storage = config.storage
    if storage.num_shards is not None and storage.num_shards % num_ranks:
        raise ConfigError(
            f"pikv.storage.num_shards = {storage.num_shards} is not a multiple of the {num_ranks} ranks of the expert-parallel group; "
            f"each rank holds as many shards"
        )
    if group is None or not spans_tensor_parallel(layers, group):
        return config
    if storage.requests == "replicated":
        raise ConfigError(
            "pikv.storage.requests = 'replicated', but the expert-parallel group holds tensor-parallel peers, whose keys are different heads; "
            "use 'auto' or 'distinct'"
        )
    return config.model_copy(update={"storage": storage.model_copy(update={"requests": "distinct"})})


def spans_tensor_parallel(layers: list[Layer], group: dist.ProcessGroup) -> bool:
    """Whether two ranks of the expert-parallel group are tensor-parallel peers."""
    peers = dist.get_process_group_ranks(layers[0].attention.pg_collection.tp)
    return len(set(peers) & set(dist.get_process_group_ranks(group))) > 1

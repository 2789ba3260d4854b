"""Over which ranks the entries of a Megatron-Core model are sharded: its expert-parallel group."""

from __future__ import annotations

from typing import NamedTuple

import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn

from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.errors import ConfigError, UnsupportedError

from .layers import Layer, is_latent


def expert_group(layers: list[Layer]) -> dist.ProcessGroup | None:
    """The expert-parallel group of the model's MoE layers, or of parallel_state for a dense model; None when it has one rank."""
    if not dist.is_initialized():
        return None
    group = next((layer.moe.ep_group for layer in layers if layer.moe is not None), None)
    if group is None:
        group = getattr(layers[0].attention.pg_collection, "ep", None)
        group = group or parallel_state.get_expert_model_parallel_group(check_initialized=False)
    if group is None:
        raise UnsupportedError(
            "no expert-parallel process group: the model's pg_collection has no 'ep' and parallel_state is not initialised; call "
            "parallel_state.initialize_model_parallel(expert_model_parallel_size=...) or give pg_collection its 'ep'"
        )
    return group if group.size() > 1 else None


class Peers(NamedTuple):
    """Tensor-parallel ranks that make up the whole expert-parallel group and hold the same KV heads."""

    size: int
    place: int  # this rank's, among the tensor-parallel ranks
    order: list[int]  # rank in the expert-parallel group of each tensor-parallel rank


def fit_requests(
    config: PiKVConfig, layers: list[Layer], group: dist.ProcessGroup | None, dynamic: bool, later_stage: bool = False
) -> tuple[PiKVConfig, Peers | None]:
    """Decide storage.requests where the layout leaves no choice, and check the number of shards. Returns the peers that share KV heads.

    Tensor-parallel peers in one expert group see the same tokens but hold different heads: to the store they are distinct requests,
    keyed by their rank, so each head's entry is stored once. Where they hold the same heads (a latent, or fewer KV heads than ranks) and
    nobody else is in the group, they are replicated requests. Dynamic batching serves requests of each rank's own.

    later_stage: keys come out of layers of other ranks, whose sums may differ in the last bit, so equal requests can't be recognised by
    them; "replicated" is taken at its word there, and checked by the first stage.
    """
    num_ranks = 1 if group is None else group.size()
    storage = config.storage
    if storage.num_shards is not None and storage.num_shards % num_ranks:
        raise ConfigError(
            f"pikv.storage.num_shards = {storage.num_shards} is not a multiple of the {num_ranks} ranks of the expert-parallel group; "
            f"each rank holds as many shards"
        )
    if group is None:
        return config, None
    peers = _peers(layers, group)
    if peers is not None:
        forced, why = "replicated", "its tensor-parallel peers hold the same KV heads, which are stored once"
    elif spans_tensor_parallel(layers, group):
        forced, why = "distinct", "it holds tensor-parallel peers, whose keys are different heads"
    elif dynamic:
        forced, why = "distinct", "under dynamic batching every rank has requests of its own"
    elif later_stage and storage.requests == "auto":
        forced, why = "distinct", "equal requests can't be recognised on a later pipeline stage"
    else:
        return config, None
    if storage.requests not in ("auto", forced):
        raise ConfigError(
            f"pikv.storage.requests = {storage.requests!r} does not fit the expert-parallel group: {why}; use 'auto' or {forced!r}"
        )
    return config.model_copy(update={"storage": storage.model_copy(update={"requests": forced})}), peers


def _peers(layers: list[Layer], group: dist.ProcessGroup) -> Peers | None:
    tp = layers[0].attention.pg_collection.tp
    ranks, own = dist.get_process_group_ranks(tp), dist.get_process_group_ranks(group)
    if set(ranks) != set(own) or not all(_holds_shared_heads(layer.attention, tp.size()) for layer in layers):
        return None
    return Peers(len(ranks), dist.get_rank(tp), [own.index(rank) for rank in ranks])


def _holds_shared_heads(attention: nn.Module, num_peers: int) -> bool:
    return is_latent(attention) or attention.config.num_query_groups < num_peers


def spans_tensor_parallel(layers: list[Layer], group: dist.ProcessGroup) -> bool:
    """Whether two ranks of the expert-parallel group are tensor-parallel peers."""
    peers = dist.get_process_group_ranks(layers[0].attention.pg_collection.tp)
    return len(set(peers) & set(dist.get_process_group_ranks(group))) > 1

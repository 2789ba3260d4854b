"""What modules of a model whose experts lie in other slots than their numbers do: routers and checkpoints know experts by their numbers.

A checkpoint (sharded_state_dict) has every expert and every router's row where the host would have put it, so it loads into any layout,
with or without PiKV, and one that the host wrote loads here. Optimizers build theirs from the model's, and need nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from .subclass import is_pikv, pikv_class, put_on, take_off


def place(moe: MoELayer, expert_of_slot: tuple[int, ...], first: int) -> None:
    """From now on slot i of the layer, of which this rank has those from `first`, has expert_of_slot[i]. All parts of a layer, or none."""
    there = torch.tensor(expert_of_slot, device=moe.router.weight.device)
    moved = list(expert_of_slot) != list(range(len(expert_of_slot)))
    moe.router.pikv_experts = there if moved else None
    moe.router.pikv_slots = there.argsort() if moved else None
    put_on(moe.experts, experts_class)
    moe.experts.pikv_experts, moe.experts.pikv_first = expert_of_slot, first
    for i, expert in enumerate(moe.experts.local_experts):
        put_on(expert, expert_class)
        expert.pikv_expert = expert_of_slot[first + i]


def take_back(moe: MoELayer) -> None:
    """The host's classes again, of all parts that `place` knows but the router."""
    if is_pikv(moe.experts):
        for expert in moe.experts.local_experts:
            take_off(expert)
        take_off(moe.experts)


@pikv_class
def experts_class(host: type) -> type:
    class PiKVExperts(host):
        pikv_experts: tuple[int, ...] = ()
        pikv_first = 0

        def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict[str, Any]:
            """With one key per expert (singleton_local_shards), that of the expert, not of its slot."""
            state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
            if _key_each(metadata):
                for i in range(len(self.local_experts)):
                    slot = self.pikv_first + i
                    own, named = f"{prefix}experts.{slot}.", f"{prefix}experts.{self.pikv_experts[slot]}."
                    for name, value in state.items():
                        if name.startswith(f"{prefix}local_experts.{i}."):
                            value.key = value.key.replace(own, named, 1)
            return state

    return PiKVExperts


@pikv_class
def expert_class(host: type) -> type:
    class PiKVExpert(host):
        pikv_expert = 0

        def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict[str, Any]:
            """With all experts under one key, at the offset of the expert, not of its slot."""
            if not _key_each(metadata):
                *before, (axis, _, total) = sharded_offsets
                sharded_offsets = (*before, (axis, self.pikv_expert, total))
            return super().sharded_state_dict(prefix, sharded_offsets, metadata)

    return PiKVExpert


def _key_each(metadata: dict | None) -> bool:
    return bool((metadata or {}).get("singleton_local_shards", False))


def by_number(state: dict[str, Any], experts: Tensor, slots: Tensor) -> dict[str, Any]:
    """A router's sharded state, of E rows: written in the order of experts, read back in that of slots. experts, slots: [E] int64."""
    return {name: _by_number(value, experts, slots) if isinstance(value, ShardedTensor) else value for name, value in state.items()}


def _by_number(tensor: ShardedTensor, experts: Tensor, slots: Tensor) -> ShardedTensor | ShardedTensorFactory:
    rows = tensor.local_shape[0] if tensor.local_shape else 0
    if rows != len(experts):
        return tensor  # a count of steps

    def build(key: str, data: Tensor, replica_id, flattened_range) -> ShardedTensor:
        return replace(tensor, key=key, data=data.index_select(0, slots.to(data.device)), dtype=data.dtype, replica_id=replica_id)

    def merge(loaded: Tensor) -> Tensor:
        return loaded.index_select(0, experts.to(loaded.device))

    return ShardedTensorFactory(tensor.key, tensor.data, build, merge, tensor.replica_id)

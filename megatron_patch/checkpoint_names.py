"""Under which key, and with which leading axes, a tensor of a model lies in a checkpoint that another layout of layers has written.

A model's own names are those with a layer's number in them. Everything below changes keys and axes of ShardedTensors, never data.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory

Shapes = Mapping[str, tuple[int, ...]]

# Transformer Engine has norms inside the projection that follows, but not before experts. Megatron's local layers save theirs under those
# names in every layer, before experts too; those with MLA under names of their own.
_SAME = (
    ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
    ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
    ("self_attention.q_layernorm.", "self_attention.linear_q_up_proj.layer_norm_"),
    ("self_attention.kv_layernorm.", "self_attention.linear_kv_up_proj.layer_norm_"),
)
_LAYER = re.compile(r"^(?P<stack>(?:.*\.)?layers\.)(?P<number>\d+)\.(?P<rest>.+)$")
_SINGLE_EXPERT = re.compile(r"\.experts\.\d+\.")
# What Megatron-LM keeps beside a model: optimizers, random states, its rerun machinery; and heads that only the training loss reads.
_BESIDE = re.compile(r"^(?:(?:chained_\d+\.)?optimizer\.|rng_state|rerun_state_machine|common_state|mtp\.)")


def model_keys(stored: Iterable[str]) -> set[str]:
    """Those that belong to the weights that inference reads."""
    return {key for key in stored if not _BESIDE.match(key)}


def metadata_for(stored: Iterable[str]) -> dict[str, Any]:
    """Of sharded_state_dict: keys by layer; one key for all experts, or one each, as they are stored."""
    return {"non_homogeneous_layers": True, "singleton_local_shards": any(_SINGLE_EXPERT.search(key) for key in stored)}


def stored_as(tensor: ShardedTensor, stored: Shapes, num_layers: int) -> ShardedTensor:
    """`tensor` with the key and the axes that it has in the checkpoint; as it is when the checkpoint has no name for it."""
    for key in _names(tensor.key):
        if key in stored:
            return replace(tensor, key=key)
        layer = _LAYER.match(key)
        if layer and (joined := layer["stack"] + layer["rest"]) in stored:
            return _in_stack(replace(tensor, key=joined), int(layer["number"]), num_layers)
    return tensor


def _names(key: str) -> list[str]:
    layer = _LAYER.match(key)
    names = [key]
    if layer:
        before = key[: layer.start("rest")]
        for pair in _SAME:
            for own, other in (pair, pair[::-1]):
                if layer["rest"].startswith(own):
                    names.append(before + other + layer["rest"].removeprefix(own))
    return names


def _in_stack(tensor: ShardedTensor, number: int, num_layers: int) -> ShardedTensor:
    """One layer of a tensor that holds all of them along its first axis."""
    return replace(
        tensor,
        global_shape=(num_layers, *tensor.global_shape),
        global_offset=(number, *tensor.global_offset),
        axis_fragmentations=None if tensor.axis_fragmentations is None else (num_layers, *tensor.axis_fragmentations),
        prepend_axis_num=tensor.prepend_axis_num + 1,
    )


def map_tensors(state: Any, change: Callable[[ShardedTensor], ShardedTensor]) -> Any:
    """A copy of a sharded state dict for a load that touches no parameter: tensors, also those that factories build, on the host, without
    the model's values, and changed."""
    if isinstance(state, dict):
        return {name: map_tensors(value, change) for name, value in state.items()}
    if isinstance(state, list):
        return [map_tensors(value, change) for value in state]
    if isinstance(state, ShardedTensorFactory):
        build = state.build_fn
        return replace(state, data=_empty(state.data), build_fn=lambda *args: _changed(build(*args), change))
    return change(replace(state, data=_empty(state.data))) if isinstance(state, ShardedTensor) else state


def _changed(built: Any, change: Callable[[ShardedTensor], ShardedTensor]) -> Any:
    if isinstance(built, dict):
        return {name: _changed(value, change) for name, value in built.items()}
    if isinstance(built, list):
        return [_changed(value, change) for value in built]
    return change(built) if isinstance(built, ShardedTensor) else built


def _empty(data: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(data, device="cpu")


def split_objects(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is to be loaded, and extra state that is None here: layers without it don't ask for that of the layers which saved."""
    nothing = {name for name, value in state.items() if isinstance(value, ShardedObject) and value.data is None}
    return {name: value for name, value in state.items() if name not in nothing}, dict.fromkeys(nothing)

"""Which Megatron-Core this integration fits: each feature's hook points are checked by signature when it is asked for, none for another."""

from __future__ import annotations

import inspect
import warnings
from functools import cache
from importlib import import_module
from typing import NamedTuple

import megatron.core

from pikv_ds.errors import UnsupportedError

TESTED = ("0.16.0", "0.16.1", "0.17.0", "0.17.1", "0.18.0", "0.18.2", "0.19.0", "0.19.2")
_OLDEST, _NEWEST = ((0, 16), (0, 19))


class Hook(NamedTuple):
    """One place where PiKV overrides or calls the host: a class or module, a name in it, the first parameters that it takes."""

    owner: str  # below megatron.core: "package.module" or "package.module:Class"
    name: str
    parameters: tuple[str, ...]


_ATTENTION = "transformer.attention:Attention"
_STATIC = "inference.contexts.static_context:StaticInferenceContext"
_DYNAMIC = "inference.contexts.dynamic_context:DynamicInferenceContext"

# By feature. A tuple of hooks in place of one: the host has one of them, which depends on its version.
FEATURES: dict[str, tuple[Hook | tuple[Hook, ...], ...]] = {
    "attention and routing": (
        Hook(
            _ATTENTION,
            "_adjust_key_value_for_inference",
            ("self", "inference_context", "query", "key", "value", "rotary_pos_emb"),
        ),
        Hook("transformer.attention:SelfAttention", "get_query_key_value_tensors", ("self", "hidden_states", "key_value_states")),
        Hook("transformer.moe.router:TopKRouter", "forward", ("self", "input")),
        Hook("transformer.moe.router:TopKRouter", "routing", ("self", "logits")),
    ),
    "multi-latent attention": (
        Hook(
            "transformer.multi_latent_attention:MLASelfAttention",
            "get_query_key_value_tensors",
            ("self", "hidden_states", "key_value_states"),
        ),
    ),
    "static batching": (
        Hook(_STATIC, "__init__", ("self", "max_batch_size", "max_sequence_length")),
        Hook(_STATIC, "reset", ("self",)),
        Hook(_STATIC, "swap_key_value_dict", ("self", "batch_idx")),
    ),
    "dynamic batching": (
        Hook(_ATTENTION, "flash_decode_and_prefill", ("self", "q", "k", "v")),
        (
            Hook(_DYNAMIC, "_allocate_memory_buffer", ("self",)),  # from 0.17
            Hook(_DYNAMIC, "allocate_all_tensors", ("self", "is_init")),
        ),
        Hook(_DYNAMIC, "append_key_value_cache", ("self", "layer_number", "key", "value")),
        Hook(_DYNAMIC, "initialize_attention_state", ("self",)),
        Hook(_DYNAMIC, "reset", ("self",)),
    ),
    "checkpoints": (
        Hook("dist_checkpointing", "save", ("sharded_state_dict", "checkpoint_dir")),
        Hook("dist_checkpointing", "load", ("sharded_state_dict", "checkpoint_dir")),
        Hook("dist_checkpointing", "load_tensors_metadata", ("checkpoint_dir",)),
        Hook("dist_checkpointing", "check_is_distributed_checkpoint", ("checkpoint_dir",)),
        Hook("dist_checkpointing.mapping", "apply_factories", ("sharded_state_dict",)),
    ),
}


def check_feature(feature: str) -> None:
    """That the installed Megatron-Core has the hook points of a key of FEATURES. Warns once of a version newer than the tested ones.

    Raises: UnsupportedError naming the version, the feature, and the hook point that is gone or takes something else; or a version that
        is too old for any of them.
    """
    version = megatron.core.__version__
    _check_age(version)
    for hooks in FEATURES[feature]:
        any_of = (hooks,) if isinstance(hooks, Hook) else hooks
        if not any(_parameters(hook)[: len(hook.parameters)] == hook.parameters for hook in any_of):
            raise UnsupportedError(f"megatron-core {version} cannot serve {feature}: {' and '.join(map(_moved, any_of))}; {_wanted()}")


def _check_age(version: str) -> None:
    line = tuple(int(part) for part in version.split(".")[:2])
    if line < _OLDEST:
        raise UnsupportedError(f"megatron-core {version} is older than {'.'.join(map(str, _OLDEST))}; {_wanted()}")
    if line > _NEWEST:
        _warn_once(version)


@cache
def _warn_once(version: str) -> None:
    warnings.warn(f"megatron-core {version} is newer than what PiKV was run on; {_wanted()}", UserWarning, stacklevel=4)


def _wanted() -> str:
    return f"tested with megatron-core {', '.join(TESTED)} (from 0.17 on they need Python >= 3.12)"


def _owner(hook: Hook):
    module, _, name = hook.owner.partition(":")
    try:
        found = import_module(f"megatron.core.{module}")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("megatron."):
            raise
        return None
    return getattr(found, name, None) if name else found


def _parameters(hook: Hook) -> tuple[str, ...]:
    found = getattr(_owner(hook), hook.name, None)
    return () if found is None else tuple(inspect.signature(found).parameters)


def _moved(hook: Hook) -> str:
    path, wanted = f"{hook.owner.rpartition(':')[2]}.{hook.name}", ", ".join(hook.parameters)
    found = _parameters(hook)
    now = f"takes ({', '.join(found)})" if found else "is gone"
    return f"{path} {now}, and PiKV hooks in where it takes ({wanted}, ...)"

"""Which Megatron-Core this integration fits: its hook points are checked by signature, the tested range is named when they differ."""

from __future__ import annotations

import inspect

import megatron.core
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext
from megatron.core.transformer.attention import Attention, SelfAttention
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.multi_latent_attention import MLASelfAttention

from pikv_ds.errors import UnsupportedError

TESTED = "0.16.1"
OLDEST = (0, 16)
_HOOKS = (
    (Attention, "_adjust_key_value_for_inference", ("self", "inference_context", "query", "key", "value", "rotary_pos_emb")),
    (Attention, "flash_decode_and_prefill", ("self", "q", "k", "v")),
    (SelfAttention, "get_query_key_value_tensors", ("self", "hidden_states", "key_value_states")),
    (MLASelfAttention, "get_query_key_value_tensors", ("self", "hidden_states", "key_value_states")),
    (TopKRouter, "forward", ("self", "input")),
    (TopKRouter, "routing", ("self", "logits")),
    (StaticInferenceContext, "__init__", ("self", "max_batch_size", "max_sequence_length")),
    (StaticInferenceContext, "reset", ("self",)),
    (StaticInferenceContext, "swap_key_value_dict", ("self", "batch_idx")),
    (DynamicInferenceContext, "allocate_all_tensors", ("self", "is_init")),
    (DynamicInferenceContext, "append_key_value_cache", ("self", "layer_number", "key", "value")),
    (DynamicInferenceContext, "initialize_attention_state", ("self",)),
    (DynamicInferenceContext, "reset", ("self",)),
)


def check_version() -> None:
    """Raises UnsupportedError when the installed Megatron-Core is too old or has moved one of the hook points."""
    version = megatron.core.__version__
    wanted = f"tested with megatron-core {TESTED}: pip install 'megatron-core=={TESTED}'"
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        raise UnsupportedError(f"megatron-core {version} is older than {OLDEST[0]}.{OLDEST[1]}; {wanted}")
    for owner, name, parameters in _HOOKS:
        found = tuple(inspect.signature(getattr(owner, name)).parameters) if hasattr(owner, name) else None
        if found is None or found[: len(parameters)] != parameters:
            now = "is gone" if found is None else f"takes ({', '.join(found)})"
            raise UnsupportedError(
                f"megatron-core {version}: {owner.__name__}.{name} {now}; PiKV hooks in where it takes ({', '.join(parameters)}, ...); "
                f"{wanted}"
            )

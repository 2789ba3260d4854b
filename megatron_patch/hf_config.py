"""A Hugging Face Qwen3-MoE or Mixtral configuration as Megatron-Core arguments, and the GPTModel built from them."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer import TransformerConfig

from pikv_ds.errors import UnsupportedError

MODEL_TYPES = ("qwen3_moe", "mixtral")


def moe_layers(hf_config) -> list[bool]:
    """Per layer: has experts."""
    dense, step = set(getattr(hf_config, "mlp_only_layers", None) or ()), getattr(hf_config, "decoder_sparse_step", 1)
    return [i not in dense and (i + 1) % step == 0 for i in range(hf_config.num_hidden_layers)]


def head_dim(hf_config) -> int:
    return getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads


def transformer_options(hf_config) -> dict[str, Any]:
    """TransformerConfig arguments that the model's mathematics needs; parallelism, dtype and kernels are the caller's.

    Raises: UnsupportedError for what this mapping does not express.
    """
    _refuse(hf_config)
    has_experts, qwen = moe_layers(hf_config), hf_config.model_type == "qwen3_moe"
    window = hf_config.sliding_window
    return {
        "num_layers": hf_config.num_hidden_layers,
        "hidden_size": hf_config.hidden_size,
        "num_attention_heads": hf_config.num_attention_heads,
        "num_query_groups": hf_config.num_key_value_heads,
        "kv_channels": head_dim(hf_config),
        "ffn_hidden_size": hf_config.intermediate_size,
        "moe_ffn_hidden_size": hf_config.moe_intermediate_size if qwen else hf_config.intermediate_size,
        "num_moe_experts": hf_config.num_local_experts,
        "moe_router_topk": hf_config.num_experts_per_tok,
        # Qwen3 without norm_topk_prob keeps the softmax over all experts; with it, and in Mixtral, the chosen ones sum to 1.
        "moe_router_pre_softmax": qwen and not hf_config.norm_topk_prob,
        "moe_layer_freq": [int(moe) for moe in has_experts],
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
        "qk_layernorm": qwen,
        "layernorm_epsilon": hf_config.rms_norm_eps,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        # W tokens with the query's own are W - 1 before it.
        "window_size": None if window is None else (window - 1, 0),
    }


def build_gpt(hf_config, *, max_sequence_length: int, **options) -> GPTModel:
    """An unloaded GPTModel with Megatron's local layers on the groups of parallel_state.

    Args: options: TransformerConfig arguments, which win over those from the configuration (on CPU: cpu_compat.cpu_config_options()).
    """
    layout = {
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor_parallel_size": parallel_state.get_expert_tensor_parallel_world_size(),
    }
    config = TransformerConfig(**{**layout, **transformer_options(hf_config), **options})
    if hf_config.vocab_size % config.tensor_model_parallel_size:
        raise UnsupportedError(
            f"vocab_size = {hf_config.vocab_size} is not a multiple of tensor_model_parallel_size = {config.tensor_model_parallel_size}"
        )
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    return GPTModel(
        config,
        spec,
        vocab_size=hf_config.vocab_size,
        max_sequence_length=max_sequence_length,
        position_embedding_type="rope",
        rotary_base=hf_config.rope_parameters["rope_theta"],
        share_embeddings_and_output_weights=hf_config.tie_word_embeddings,
    )


def _refuse(hf_config) -> None:
    if hf_config.model_type not in MODEL_TYPES:
        raise UnsupportedError(f"model_type {hf_config.model_type!r}: weights are converted for {' and '.join(MODEL_TYPES)} only")
    rope = hf_config.rope_parameters
    if rope.get("rope_type", "default") != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedError(f"rope_parameters = {dict(rope)}: only rope_type 'default' over the whole head is converted")
    if getattr(hf_config, "attention_bias", False):
        raise UnsupportedError("attention_bias is true: biases are not converted")
    if hf_config.hidden_act != "silu":
        raise UnsupportedError(f"hidden_act = {hf_config.hidden_act!r}: only 'silu' is converted")
    if len(set(getattr(hf_config, "layer_types", None) or ["same"])) > 1:
        raise UnsupportedError(f"layer_types = {hf_config.layer_types}: layers of different kinds are not converted")

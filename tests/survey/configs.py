"""A tiny random model of any causal-LM family, by rule: what a configuration's fields are called says how small they become."""

from __future__ import annotations

import re

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

FAMILIES = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY = 128
LAYERS = (2, 3, 4, 6, 8, 12)  # tried in this order, until every kind of layer that the default configuration has is there

# The first pattern that a whole name matches gives its value; "layers" stands for the number of layers.
VALUES: list[tuple[str, object]] = [
    (r"num_key_value_heads|num_kv_heads|num_query_groups|swa_num_key_value_heads", 2),
    (r"num_(encoder|decoder)_layers|(encoder|decoder)_layers", 2),
    (r"num_hidden_layers|n_layers?|num_layers|num_blocks|depth", "layers"),
    (r"adapter_rank|num_kv_shared_layers|num_nextn_predict_layers|num_mem_blocks", 1),
    (r".*_hidden_layers", 1),
    (r"vocab_size_per_layer_input|.*vocab_size|unpadded_vocab_size|codebook_size", VOCABULARY),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_(source|target)_positions|model_max_length|context_length", 512),
    (r"linear_num_value_heads|linear_num_key_heads|linear_num_heads|index_n_heads", 4),
    (r"mamba_n_heads|n_mamba_heads|mamba_num_heads", 8),
    (r".*attention_heads|n_heads?|num_heads|encoder_attention_heads", 4),
    (r"qk_head_dim", 24),
    (r"qk_rope_head_dim", 8),
    (r"v_head_dim", 24),
    (r".*head_dim|attention_head_size|d_kv|d_head|dim_head|kv_channels|mamba_d_head|mamba_headdim", 16),
    (r"rotary_dim", 8),
    (r"sliding_window|sliding_window_size|attention_window_size|attention_chunk_size|window_size|local_attention|keep_window_size", 8),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|moe_top_k|top_k_experts", 2),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts|n_group|topk_group|first_k_dense_replace|num_expert_group", 1),
    (r"num_experts|num_local_experts|n_routed_experts|moe_num_experts", 8),
    (r"zero_expert_num", 2),
    (r".*lora_rank|hc_lowrank|time_step_rank|mamba_dt_rank|laurel_rank|.*_norm_rank|d_rel", 16),
    (r".*state_size|mamba_d_state", 16),
    (r".*chunk_size|chunk_size", 16),
    (r"mamba_d_ssm", 128),
    (r"index_topk", 512),
    (r".*(intermediate_size|ffn_dim|ffn_hidden_size|_mlp|mlp_dim)|n_inner|dim_ff|d_ff|dff|.*feed_forward_size", 96),
    (r"attention_hidden_size", 128),
    (r"hidden_size_per_layer_input", 16),
    (r"(input|output|backbone)?_?(hidden|embedding)_size|input_size|d_model|n_embd|emb_dim|dim_model|embedding_dim|lru_width", 64),
    (r"hidden_size_global|word_embed_proj_dim|router_hidden_size|ple_embed_dim|.*_embed_dim|out_hidden_size", 64),
]  # fmt: skip
FLAGS = {"is_decoder": True, "use_cache": True}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


# Fields whose value None says nothing, though the model needs a number.
NEEDED = ("head_dim", "num_key_value_heads", "n_routed_experts", "n_shared_experts", "first_k_dense_replace", "num_experts_per_tok")
# A latent (MLA): every head has its own key, and what the configuration calls a head's width is that of the rotated part.
LATENT = {"num_key_value_heads": 4, "head_dim": 8}
MIXED = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
# What a rule by name cannot know: sizes that hang together, lists that a class does not make anew for fewer layers, and layers that its
# default configuration does not have although the class is there for them.
HANG_TOGETHER = {
    "bamba": {"num_hidden_layers": 4, "attn_layer_indices": [1, 3]},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"], "rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]} for kind in ("sliding_attention", "full_attention")}},
    "doge": {"num_experts": 4, "is_moe": False},
    "dots3_note": {"text_config": {"num_key_value_heads": 4}, "per_layer_config": None},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma3n_text": {"num_hidden_layers": 6, "num_kv_shared_layers": 2, "layer_types": [
        "sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"num_hidden_layers": 4, "layer_types": MIXED},
    "lfm2_moe": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "recurrent_gemma": {"num_hidden_layers": 3, "num_attention_heads": 4},
    "reformer": {"axial_pos_embds": False},
    "xlstm": {"num_blocks": 2, "num_heads": 4, "hidden_size": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    "zamba2": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1, "sliding_window": 8, "layer_types": ["hybrid", "hybrid_sliding"]},
}  # fmt: skip
QSA = {
    "num_hidden_layers": 4,
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}
GEMMA4 = {"num_hidden_layers": 6, "num_kv_shared_layers": 2, "global_head_dim": 32, "layer_types": [
    "sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]}  # fmt: skip
HANG_TOGETHER |= {"qwen4_exp_text": QSA, "qwen4_exp": {"text_config": QSA}}
HANG_TOGETHER |= {name: GEMMA4 for name in ("gemma4_text", "gemma4_unified_text")}
HANG_TOGETHER |= {name: {"text_config": GEMMA4} for name in ("gemma4", "gemma4_unified")}


def small(fields: dict, layers: int) -> dict:
    """The fields of a configuration, as to_dict() gives them, that become small; nested ones too. The others keep their defaults."""
    found = {name: value for name, value in (FLAGS | TOKENS).items() if name in fields}
    for name, value in fields.items():
        if isinstance(value, dict) and name.endswith("_config") and not name.startswith("per_layer"):
            found[name] = small(value, layers) | {key: value[key] for key in ("model_type",) if key in value}
        elif name.endswith(("_token_id", "_token_index")) and name not in TOKENS and isinstance(value, int):
            found[name] = 3
        elif (isinstance(value, int) and not isinstance(value, bool)) or (value is None and name in NEEDED):
            new = next((new for pattern, new in VALUES if re.fullmatch(pattern, name)), None)
            if new is not None:
                found[name] = layers if new == "layers" else new
    if found.get("kv_lora_rank"):
        found |= {name: value for name, value in LATENT.items() if name in found}
    return found


def merged(fields: dict, changes: dict) -> dict:
    """fields with those of `changes`, in nested configurations too."""
    both = {
        key: merged(fields[key], value) for key, value in changes.items() if key.endswith("_config") and isinstance(fields.get(key), dict)
    }
    return fields | changes | both


def layer_kinds(config: PreTrainedConfig) -> set[str]:
    return set(get_layer_types_and_kwargs(config.get_text_config(decoder=True))[0])


def tiny_config(family: str, **changes) -> PreTrainedConfig:
    """The smallest configuration of a family that has every kind of layer that its default configuration has."""
    config_class = CONFIG_MAPPING[family]
    default = config_class()
    wanted, error, own = layer_kinds(default), None, merged(HANG_TOGETHER.get(family, {}), changes)
    for layers in LAYERS:
        try:
            config = config_class(**merged(small(default.to_dict(), layers), own))
        except ValueError as raised:
            error = raised
            continue
        if own or layer_kinds(config) == wanted:
            return config
    raise error or ValueError(f"no configuration of at most {LAYERS[-1]} layers has all of {sorted(wanted)}")


def tiny_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Random weights, f32, eager attention; the same at every call."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() >= 2:  # the default initialisation gives near-uniform logits, on which greedy tokens would be ties
            nn.init.normal_(parameter, std=0.08)
    return model

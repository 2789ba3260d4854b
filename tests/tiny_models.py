"""Tiny random models of every supported family: two layers, eight experts top-2, fp32."""

import torch
from torch import nn
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

COMMON = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    num_experts_per_tok=2,
)
FAMILIES = {
    "qwen3_moe": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        dict(num_key_value_heads=2, head_dim=16, num_experts=8, moe_intermediate_size=32, norm_topk_prob=True),
    ),
    "mixtral": (MixtralConfig, MixtralForCausalLM, dict(num_key_value_heads=2, num_local_experts=8, sliding_window=8)),
    "deepseek_v3": (
        DeepseekV3Config,
        DeepseekV3ForCausalLM,
        dict(
            num_key_value_heads=4,
            moe_intermediate_size=32,
            n_shared_experts=1,
            n_routed_experts=8,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
            kv_lora_rank=16,
            q_lora_rank=24,
            qk_rope_head_dim=8,
            qk_nope_head_dim=16,
            v_head_dim=12,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
        ),
    ),
    "deepseek_v2": (
        DeepseekV2Config,
        DeepseekV2ForCausalLM,
        dict(
            num_key_value_heads=4,
            moe_intermediate_size=32,
            n_shared_experts=1,
            n_routed_experts=8,
            n_group=1,
            topk_group=1,
            topk_method="greedy",
            first_k_dense_replace=1,
            kv_lora_rank=16,
            q_lora_rank=24,
            qk_rope_head_dim=8,
            qk_nope_head_dim=16,
            v_head_dim=12,
        ),
    ),
    "qwen2_moe": (
        Qwen2MoeConfig,
        Qwen2MoeForCausalLM,
        dict(num_key_value_heads=2, num_experts=8, moe_intermediate_size=32, shared_expert_intermediate_size=32),
    ),
    "qwen3_dense": (Qwen3Config, Qwen3ForCausalLM, dict(num_key_value_heads=2, head_dim=16)),
    "gpt_oss": (
        GptOssConfig,
        GptOssForCausalLM,
        dict(
            num_key_value_heads=2, head_dim=16, num_local_experts=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
        ),
    ),
    "gemma2": (  # scores are bounded, tightly; windows
        Gemma2Config,
        Gemma2ForCausalLM,
        dict(num_key_value_heads=2, head_dim=16, sliding_window=8, attn_logit_softcapping=0.5, query_pre_attn_scalar=16),
    ),
    "qwen3_next": (  # a recurrence, then attention
        Qwen3NextConfig,
        Qwen3NextForCausalLM,
        dict(
            num_key_value_heads=2,
            head_dim=16,
            num_experts=8,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
            layer_types=["linear_attention", "full_attention"],
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
        ),
    ),
    "olmoe": (OlmoeConfig, OlmoeForCausalLM, dict(num_key_value_heads=2, num_experts=8)),
}


def tiny_model(family: str, attention: str = "eager", **changes) -> PreTrainedModel:
    """The same weights on every rank and at every call."""
    config_class, model_class, options = FAMILIES[family]
    torch.manual_seed(0)
    settings = {**COMMON, **options, **changes}
    if family in ("qwen3_dense", "gemma2"):
        settings.pop("num_experts_per_tok")
    config = config_class(**settings, attn_implementation=attention)
    model = model_class(config).eval().float()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        # The default initialisation gives near-uniform logits, on which greedy tokens would be ties.
        if parameter.dim() >= 2:
            nn.init.normal_(parameter, std=0.08)
        if "sinks" in name:
            nn.init.normal_(parameter, std=1.0)
    return model


def fingerprint(model: PreTrainedModel) -> list[torch.Tensor]:
    """By which a trained part knows it, of every layer."""
    from pikv_ds.adapters.hf.anatomy import find_attentions
    from pikv_ds.adapters.hf.fingerprint import key_norms

    return [key_norms(attention, model.config.num_key_value_heads) for attention in find_attentions(model)]


def prompt(length: int, seed: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, COMMON["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))

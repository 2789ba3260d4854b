"""A decoder of Megatron-Core's local layers for any TransformerConfig, multi-latent attention included."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention


class LatentCoreAttention(DotProductAttention):
    """Megatron's local core attention with the two arguments that MLASelfAttention passes: only Transformer Engine's takes them."""

    def __init__(self, *args, k_channels: int | None = None, v_channels: int | None = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)  # the base class of MLASelfAttention builds one without them first
        self.hidden_size_per_partition = (v_channels or 0) * self.num_attention_heads_per_partition


def local_decoder(config: TransformerConfig) -> Any:
    """TransformerBlockSubmodules of this pipeline stage; experts are SequentialMLP with config.moe_grouped_gemm off."""
    spec = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization=config.normalization, qk_l2_norm=config.qk_l2_norm
    )
    if config.multi_latent_attention:
        for layer in spec.layer_specs:
            layer.submodules.self_attention.submodules.core_attention = LatentCoreAttention
    return spec

"""Settings of a Megatron-Core model that PiKV cannot honour, each refused by name before anything runs."""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from torch import nn

from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.errors import ConfigError, UnsupportedError

EXPERT_IDS = ("previous_layer", "lookahead", "true", "hash")
HEADS_WAIT = hasattr(MultiTokenPredictionLayer, "forward_single_position")
"""From 0.17 on: heads of multi-token prediction run in training, and when the engine speculates, which PiKV's context refuses."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def refuse_model(model: nn.Module, config: TransformerConfig) -> None:
    """Raises UnsupportedError with the setting, its value and the way out."""
    facts = [
        (config.context_parallel_size > 1, "context_parallel_size", "PiKV shards the cache over experts, not over context; use 1"),
        (config.cuda_graph_impl != "none", "cuda_graph_impl", "pages grow between steps, which a captured graph can't follow; use 'none'"),
        (config.flash_decode, "flash_decode", "its kernel writes a dense cache of its own; set it to False"),
        (getattr(config, "cache_mla_latents", False), "cache_mla_latents", "PiKV stores the latent itself; set it to False"),
        (
            getattr(config, "experimental_attention_variant", None) is not None,
            "experimental_attention_variant",
            "its attention reads more than keys and values; PiKV does not handle it",
        ),
        (
            config.sequence_parallel,
            "sequence_parallel",
            "a decode step of one token can't be split over tensor-parallel ranks, and routers would see a part of the tokens; build the "
            "inference model without it",
        ),
        (
            bool(config.mtp_num_layers) and not HEADS_WAIT,
            "mtp_num_layers",
            "megatron-core 0.16 runs the heads at inference too, and can't decode with them; build the inference model without",
        ),
    ]
    for refused, name, way_out in facts:
        if refused:
            raise UnsupportedError(f"TransformerConfig.{name} = {getattr(config, name)!r} with PiKV: {way_out}")
    for module in model.modules():
        if type(module).__name__ == "MambaLayer":
            raise UnsupportedError(
                f"layer {module.layer_number} is a MambaLayer, which keeps a state that is not keys and values in Megatron's own contexts; "
                f"PiKV handles stacks of attention, experts and MLPs"
            )
        if getattr(module, "position_embedding_type", None) == "mrope":
            raise UnsupportedError(
                "position_embedding_type = 'mrope': its rotations depend on the input, not on the position alone; PiKV does not handle it"
            )


def refuse_config(config: PiKVConfig) -> None:
    """Raises ConfigError for values of the "pikv" block that have no meaning here."""
    if not config.enabled:
        raise ConfigError("pikv.enabled is false: there is nothing to enable; drop the call or set it to true")
    if config.storage.prefix.enabled:
        raise ConfigError("pikv.storage.prefix.enabled = true: under Megatron-Core no request takes over another's entries; leave it out")
    if config.storage.expert_ids not in EXPERT_IDS:
        raise ConfigError(
            f"pikv.storage.expert_ids = {config.storage.expert_ids!r}: under Megatron-Core this version takes ids from "
            f"{', '.join(map(repr, EXPERT_IDS))}"
        )


def refuse_dtype(dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        legal = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise UnsupportedError(f"the attention has parameters of dtype {dtype}; PiKV stores {legal}")

"""What a run must know of a model before any rank loads it: from transformers, or from a Megatron checkpoint's arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pikv_ds.errors import UnsupportedError
from pikv_ds.spec import LayerSpec

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """layers: KV geometry of the whole model. experts: per layer that has some, 1 without. longest: positions, None = no limit is named."""

    layers: list[LayerSpec]
    experts: int
    longest: int | None


def facts_of(config: Any) -> ModelFacts:
    """config: of transformers."""
    from pikv_ds.adapters.hf.model_spec import read_model_spec

    text = config.get_text_config(decoder=True)
    return ModelFacts(read_model_spec(config), experts_of(config), getattr(text, "max_position_embeddings", None))


def experts_of(config: Any) -> int:
    text = config.get_text_config(decoder=True)
    return next((count for name in _EXPERTS if (count := getattr(text, name, None))), 1)


def facts_of_checkpoint(weights: str) -> ModelFacts:
    """weights: a folder with args. Imports Megatron-Core. Raises: UnsupportedError."""
    from pikv_ds.megatron_patch.args_config import read_architecture
    from pikv_ds.megatron_patch.checkpoint_folder import checkpoint_args

    architecture = read_architecture(checkpoint_args(weights))
    return ModelFacts(architecture.layer_specs(), architecture.num_experts, architecture.max_positions)


def has_args(weights: str) -> bool:
    """Whether a checkpoint says itself what model it is of; not whether that can be built."""
    from pikv_ds.megatron_patch.checkpoint_folder import checkpoint_args

    try:
        checkpoint_args(weights)
    except UnsupportedError:
        return False
    return True

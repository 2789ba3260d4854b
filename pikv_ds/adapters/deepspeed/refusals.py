"""DeepSpeed features that change what an attention layer sees, refused by name before DeepSpeed runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepspeed.pipe import PipelineModule
from torch import nn

from pikv_ds.errors import UnsupportedError

from .config import nested


def check_model(model: nn.Module) -> None:
    from transformers import PreTrainedModel

    if isinstance(model, PipelineModule):
        raise UnsupportedError(
            "pikv is enabled and model is a DeepSpeed PipelineModule, whose layers PiKV cannot "
            "reach as one model; pass the transformers model itself or set pikv.enabled to false"
        )
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedError(
            f"pikv is enabled and model is a {type(model).__name__}, not a transformers "
            f"PreTrainedModel; pass the model without wrappers, or set pikv.enabled to false"
        )


def check_initialize(ds_config: Mapping[str, Any], model: nn.Module, mpu: Any = None) -> None:
    """Refuse what `deepspeed.initialize` would do to the model and PiKV cannot follow."""
    _at_most_one("sequence_parallel_size", ds_config.get("sequence_parallel_size"), "its ranks hold parts of every sequence")
    if mpu is not None:
        for name in (
            "get_tensor_model_parallel_world_size",
            "get_model_parallel_world_size",
            "get_sequence_parallel_world_size",
            "get_pipeline_model_parallel_world_size",
        ):
            if hasattr(mpu, name):
                _at_most_one(f"mpu.{name}()", getattr(mpu, name)(), "its ranks hold parts of the model")
    if nested(ds_config, "hybrid_engine", "enabled"):
        raise UnsupportedError(
            "hybrid_engine.enabled is true: the hybrid engine swaps in its own attention modules "
            "with a dense cache; turn it off or set pikv.enabled to false"
        )
    stage = nested(ds_config, "zero_optimization", "stage") or 0
    if stage == 3 and getattr(model.config.get_text_config(decoder=True), "kv_lora_rank", None):
        raise UnsupportedError(
            f"zero_optimization.stage is 3 and the model type is {model.config.model_type!r}: "
            f"latent attention reads kv_b_proj.weight outside its module, where ZeRO-3 has it "
            f"partitioned; use stage 0 to 2 or set pikv.enabled to false"
        )


def check_inference(ds_config: Mapping[str, Any]) -> None:
    """Refuse what `deepspeed.init_inference` would do to the model and PiKV cannot follow."""
    for key, effect in (
        ("replace_with_kernel_inject", "swaps in attention modules with their own dense cache"),
        ("kernel_inject", "swaps in attention modules with their own dense cache"),
        ("enable_cuda_graph", "replays one forward, while a cache changes shape at every step"),
    ):
        if ds_config.get(key):
            raise UnsupportedError(f"{key} is true: it {effect}; set it to false or set pikv.enabled to false")


def _at_most_one(key: str, size: Any, why: str) -> None:
    if size is not None and size != 1 and size != 0:
        raise UnsupportedError(
            f"{key} is {size} and PiKV is not sharded over it: {why}; set {key} to 1 (experts may "
            f"be sharded with expert_parallel under initialize) or set pikv.enabled to false"
        )

"""Read a Hugging Face model configuration into the KV geometry of its layers."""

from __future__ import annotations

from pathlib import Path

import transformers
from transformers import AutoConfig, PreTrainedConfig

try:
    from transformers.cache_utils import get_layer_types_and_kwargs
except ImportError as error:
    raise ImportError(
        f"transformers {transformers.__version__} has no cache_utils.get_layer_types_and_kwargs, through which PiKV reads layer types; "
        f"tested with 5.23.0: pip install 'transformers>=5.23'"
    ) from error

from pikv_ds.errors import UnsupportedError
from pikv_ds.spec import LayerSpec

_LAYER_TYPES = ("full_attention", "sliding_attention")


def load_model_config(path: str | Path) -> PreTrainedConfig:
    """Configuration of a model folder or of a config.json file on disk. Runs no remote code and downloads nothing."""
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"no model folder or config.json at {str(path)!r}; give a path on disk")
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UnsupportedError(f"{str(path)!r} holds no model configuration that transformers knows: {error}") from error


def read_model_spec(config: PreTrainedConfig) -> list[LayerSpec]:
    """One LayerSpec per layer of a decoder.

    Raises:
        UnsupportedError: the model is an encoder-decoder, or has layers that are neither full nor sliding-window
            attention, or does not say how many KV heads it has.
    """
    if config.is_encoder_decoder:
        raise UnsupportedError(f"model_type {config.model_type!r} is an encoder-decoder; PiKV handles decoder-only models")
    text = config.get_text_config(decoder=True)
    types, options = get_layer_types_and_kwargs(text)
    foreign = sorted({kind for kind in types if kind not in _LAYER_TYPES})
    if foreign:
        where = [idx for idx, kind in enumerate(types) if kind in foreign]
        raise UnsupportedError(
            f"model_type {text.model_type!r} has layers of type {', '.join(foreign)} (layers {_brief(where)}); "
            f"PiKV stores {' and '.join(_LAYER_TYPES)} layers only"
        )
    geometry = [_geometry(layer) for layer in text.per_layer_config]
    return [
        LayerSpec(layer_idx=idx, window=option.get("sliding_window"), **shape)
        for idx, (option, shape) in enumerate(zip(options, geometry, strict=True))
    ]


def _geometry(layer: PreTrainedConfig) -> dict:
    if getattr(layer, "kv_lora_rank", None) is not None:
        rank = layer.kv_lora_rank
        return {"num_kv_heads": 1, "k_dim": rank + layer.qk_rope_head_dim, "v_dim": rank, "latent": True}
    if getattr(layer, "multi_query", False) or getattr(layer, "num_kv_heads", None) is not None:
        raise UnsupportedError(
            f"model_type {layer.model_type!r} gives its KV heads as multi_query / num_kv_heads; "
            f"PiKV reads num_key_value_heads or num_attention_heads"
        )
    num_q_heads = layer.num_attention_heads
    num_kv_heads = getattr(layer, "num_key_value_heads", None) or num_q_heads
    head_dim = getattr(layer, "head_dim", None) or layer.hidden_size // num_q_heads
    return {"num_kv_heads": num_kv_heads, "k_dim": head_dim, "v_dim": head_dim, "latent": False}


def _brief(indices: list[int]) -> str:
    shown = ", ".join(str(idx) for idx in indices[:4])
    return shown if len(indices) <= 4 else f"{shown}, ... {len(indices)} in all"

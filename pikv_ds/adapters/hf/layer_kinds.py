"""What the layers of a transformers model keep between forwards, by the cache layer that transformers itself would give them."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig, cache_utils
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
    get_layer_types_and_kwargs,
)

from pikv_ds.errors import UnsupportedError

_BOTH = (LinearAttentionAndFullAttentionLayer, LinearAttentionAndSlidingWindowAttentionLayer)
_STORED = (DynamicLayer, DynamicSlidingWindowLayer, *_BOTH)
EmptyLayer = getattr(cache_utils, "DummyLayer", LinearAttentionLayer)
"""What transformers puts where a layer keeps nothing. Before 5.23: a state that nobody fills."""
_EMPTY, _OLDER_EMPTY = "dummy", ("moe", "mlp")


@dataclass(frozen=True, slots=True)
class LayerKind:
    """One layer of the model's cache."""

    name: str
    """As transformers calls it: "full_attention", "linear_attention", ..."""
    stores: bool
    """It has keys and values, which PiKV keeps."""
    window: int | None = None
    states: int = 0
    """Of a convolution or a recurrence: how many states transformers' own layer keeps for it. PiKV leaves them there."""

    @property
    def shares(self) -> bool:
        """It has nothing of its own: no attention, or attention to what another layer computes."""
        return not self.stores and not self.states


def layer_kinds(config: PreTrainedConfig) -> list[LayerKind]:
    """Raises: UnsupportedError for an encoder-decoder, and for layers that keep something else."""
    if config.is_encoder_decoder:
        raise UnsupportedError(f"model_type {config.model_type!r} is an encoder-decoder; PiKV handles decoder-only models")
    text = config.get_text_config(decoder=True)
    names, options = _layer_types(text)
    foreign = sorted({name for name in names if not _known(name)})
    if foreign:
        where = [idx for idx, name in enumerate(names) if name in foreign]
        raise UnsupportedError(
            f"model_type {text.model_type!r} has layers of type {', '.join(foreign)} (layers {_brief(where)}); PiKV stores full and "
            "sliding attention, beside layers that keep the state of a convolution or a recurrence"
        )
    return [_kind(name, option) for name, option in zip(names, options, strict=True)]


def _layer_types(text: PreTrainedConfig) -> tuple[list[str], list[dict]]:
    """By layer, as transformers 5.23 and later give them: before, layers that keep nothing had other names, or none at the end."""
    names, options = get_layer_types_and_kwargs(text)
    if _EMPTY in DYNAMIC_LAYER_TYPE_MAPPING:
        return names, options
    shared = getattr(text, "num_kv_shared_layers", None) or 0
    return [_EMPTY if name in _OLDER_EMPTY else name for name in names] + [_EMPTY] * shared, options + [{}] * shared


def _known(name: str) -> bool:
    made = DYNAMIC_LAYER_TYPE_MAPPING.get(name)
    return name != "chunked_attention" and (name == _EMPTY or made in _STORED or made is LinearAttentionLayer)


def _kind(name: str, option: dict) -> LayerKind:
    if name == _EMPTY:
        return LayerKind(name, stores=False)
    made = DYNAMIC_LAYER_TYPE_MAPPING[name]
    states = option.get("number_of_states", 1) if issubclass(made, LinearAttentionLayer) else 0
    return LayerKind(name, made in _STORED, option.get("sliding_window"), states)


def _brief(indices: list[int]) -> str:
    shown = ", ".join(str(idx) for idx in indices[:4])
    return shown if len(indices) <= 4 else f"{shown}, ... {len(indices)} in all"

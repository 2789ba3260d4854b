"""The KV geometry of a model's layers, from its configuration, and from its attention modules where there is a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from pikv_ds.errors import UnsupportedError
from pikv_ds.spec import LayerSpec

from .geometry import first_head_of, latent_of, of_configuration, of_module, softcap_of
from .layer_kinds import LayerKind, layer_kinds


def load_model_config(path: str | Path) -> PreTrainedConfig:
    """Configuration of a model folder or of a config.json file on disk. Runs no remote code and downloads nothing."""
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"no model folder or config.json at {str(path)!r}; give a path on disk")
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UnsupportedError(f"{str(path)!r} holds no model configuration that transformers knows: {error}") from error


def read_model_spec(
    config: PreTrainedConfig, attentions: Sequence[nn.Module] | None = None, at: Sequence[int] | None = None
) -> list[LayerSpec]:
    """One LayerSpec per layer of a decoder that has keys and values, numbered in their order.

    Args:
        attentions: their attention modules: what these have decides, not what a configuration calls it. None: the configuration alone.
        at: [L] their indices among all layers; None: those that the configuration says have keys and values.

    Raises:
        UnsupportedError: the model is an encoder-decoder, or has layers that keep something else than keys and values or a state, or does
            not say how many KV heads it has.
    """
    text, kinds = config.get_text_config(decoder=True), layer_kinds(config)
    at = [i for i, kind in enumerate(kinds) if kind.stores] if at is None else at
    layers = list(text.per_layer_config)
    specs = []
    for number, index in enumerate(at):
        module = None if attentions is None else attentions[number]
        shape = of_configuration(layers[index]) if module is None else latent_of(module, layers[index]) or of_module(module, layers[index])
        window, softcap = _window(kinds, text, layers, index), softcap_of(module, layers[index])
        first_head = 0 if shape["latent"] else first_head_of(module, layers[index])
        specs.append(LayerSpec(layer_idx=number, window=window, softcap=softcap, first_head=first_head, **shape))
    return specs


def _window(kinds: Sequence[LayerKind], text: PreTrainedConfig, layers: Sequence[PreTrainedConfig], index: int) -> int | None:
    """In tokens. A layer that attends to what another computes has the kind of window that its own type has."""
    if kinds[index].stores:
        return kinds[index].window
    return layers[index].sliding_window if text.layer_types[index] == "sliding_attention" else None

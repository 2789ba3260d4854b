"""Where the parts of a transformers model are: its decoder, the decoder's layers, their attention modules."""

from __future__ import annotations

import inspect

from torch import nn

from pikv_ds.errors import UnsupportedError


def find_attentions(model: nn.Module) -> list[nn.Module]:
    """The attention modules of the decoder's layers, in order. Raises: UnsupportedError."""
    return anatomy(model)[2]


def anatomy(model: nn.Module) -> tuple[nn.Module, list[nn.Module], list[nn.Module]]:
    """The decoder (the module whose forward takes past_key_values and loops over layers), its layers, their attention modules."""
    for module in model.modules():
        layers = next((found for name in ("layers", "h") if isinstance(found := getattr(module, name, None), nn.ModuleList)), None)
        if layers is not None and "past_key_values" in inspect.signature(module.forward).parameters:
            return module, list(layers), [_attention_of(layer, i) for i, layer in enumerate(layers)]
    raise UnsupportedError(f"{type(model).__name__} has no decoder with a list of layers whose forward takes past_key_values")


def _attention_of(layer: nn.Module, layer_idx: int) -> nn.Module:
    found = [m for m in layer.modules() if getattr(m, "layer_idx", None) == layer_idx and "attention" in type(m).__name__.lower()]
    if len(found) != 1:
        raise UnsupportedError(
            f"{type(layer).__name__} {layer_idx} has {len(found)} attention modules that know their layer_idx; "
            "PiKV needs exactly one per layer"
        )
    return found[0]

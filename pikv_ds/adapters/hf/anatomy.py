"""Where the parts of a transformers model are: its decoder, and the attention module of each layer with keys and values."""

from __future__ import annotations

import inspect
import re
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from pikv_ds.errors import UnsupportedError

from .argument_names import IN_GENERATE, cache_name
from .layer_kinds import LayerKind, layer_kinds

# Attention to an encoder's states, beside that of the decoder itself.
_CROSS = re.compile(r"cross|encoder_attn|encdec", re.IGNORECASE)


class Anatomy(NamedTuple):
    """L layers that have keys and values, in the order of the decoder; there may be others between them."""

    decoder: nn.Module
    """Its forward takes a cache and makes the masks."""
    layers: list[nn.Module]
    """[L] the decoder layers; one that has two attention modules stands there twice."""
    attentions: list[nn.Module]
    """[L]"""
    kinds: list[LayerKind]
    """Of all layers that the model's cache has."""
    at: list[int]
    """[L] the index of each in the model's cache, ascending."""

    @property
    def cache_name(self) -> str:
        """What the decoder's forward calls its cache."""
        name = cache_name(self.decoder.forward)
        assert name is not None  # it was found by that
        return name

    def first(self, num_layers: int) -> Anatomy:
        """Of the first layers of the cache alone. Raises: UnsupportedError when none of them has keys and values."""
        at = [index for index in self.at if index < num_layers]
        if not at:
            raise UnsupportedError(f"the first {num_layers} layers of {type(self.decoder).__name__} have no keys and values to store")
        return Anatomy(self.decoder, self.layers[: len(at)], self.attentions[: len(at)], self.kinds[:num_layers], at)


def find_attentions(model: nn.Module) -> list[nn.Module]:
    """The attention modules of the decoder's layers, in order. Raises: UnsupportedError."""
    return anatomy(model).attentions


def anatomy(model: nn.Module) -> Anatomy:
    """Raises: UnsupportedError when there is no decoder, or not one attention module for every layer that has keys and values."""
    kinds = layer_kinds(model.config)
    takers = [module for module in model.modules() if cache_name(module.forward) is not None]
    decoders = [module for module in takers if isinstance(module, PreTrainedModel)] or takers
    missing = f"{type(model).__name__} has no module whose forward takes {IN_GENERATE}"
    for decoder in reversed(decoders):  # from the inside out: masks are made in the innermost that has all layers
        found = _attentions(decoder)
        at = [i for i, kind in enumerate(kinds) if kind.stores or (kind.shares and len(found.get(i, [])) == 1)]
        wrong = next((i for i in at if len(found.get(i, [])) != 1), None)
        if wrong is None and at:
            paths = [found[i][0] for i in at]
            layers = [_layer_of(decoder, path) for path in paths]
            return Anatomy(decoder, layers, [decoder.get_submodule(path) for path in paths], kinds, at)
        if wrong is not None:
            missing = f"layer {wrong} of {type(decoder).__name__} has {_count(found.get(wrong, []))}"
    raise UnsupportedError(missing if any(kind.stores for kind in kinds) else _without_attention(model, kinds))


def _count(paths: list[str]) -> str:
    if not paths:
        return (
            "no attention module that knows its layer_idx and calls its attention through transformers' AttentionInterface; "
            "its attention can't be replaced"
        )
    return f"{len(paths)} attention modules ({', '.join(paths)}); PiKV needs exactly one for each layer with keys and values"


def _without_attention(model: nn.Module, kinds: list[LayerKind]) -> str:
    names = ", ".join(sorted({kind.name for kind in kinds}))
    return f"{type(model).__name__} has no layer with keys and values ({names}): there is nothing to store; use it without PiKV"


def _attentions(decoder: nn.Module) -> dict[int, list[str]]:
    """By layer_idx, the paths of modules that attend to the decoder's own tokens."""
    found: dict[int, list[str]] = {}
    for path, module in decoder.named_modules():
        layer_idx = getattr(module, "layer_idx", None)
        if isinstance(layer_idx, int) and _attends(module) and not _CROSS.search(f"{path} {type(module).__name__}"):
            found.setdefault(layer_idx, []).append(path)
    return found


def _attends(module: nn.Module) -> bool:
    """Whether its forward calls the attention function that is registered with transformers."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def _layer_of(decoder: nn.Module, path: str) -> nn.Module:
    """The decoder layer that the attention module at `path` belongs to: the entry of the outermost list on the way to it."""
    names = path.split(".")
    for end in range(len(names)):
        if isinstance(decoder.get_submodule(".".join(names[:end])), nn.ModuleList):
            return decoder.get_submodule(".".join(names[: end + 1]))
    return decoder.get_submodule(path)

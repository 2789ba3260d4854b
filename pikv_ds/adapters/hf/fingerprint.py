"""How a transformers model is told from others: by the key projections of its attention, and by a digest of its weights."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from pikv_ds.cache.cache import PiKVCache
from pikv_ds.errors import SessionError, UnsupportedError
from pikv_ds.exchange.digest import digest
from pikv_ds.sessions.marks import check_norms
from pikv_ds.spec import LayerSpec


class Host(Protocol):
    """A model with caches (host.py)."""

    model: nn.Module
    name: str
    attentions: list[nn.Module]
    specs: list[LayerSpec]


def check_calibration(core: PiKVCache, attentions: list[nn.Module]) -> None:
    """Raises: ConfigError when what was fitted to a model, the codec's calibration or the parts of router and policy, was fitted to other
    weights than these attention modules have."""
    if core.blueprint.knows_model:
        for spec, attention in zip(core.layers, attentions, strict=True):
            core.blueprint.check_model(spec, key_norms(attention, spec.num_kv_heads))


def key_norms(attention: nn.Module, num_kv_heads: int) -> Tensor:
    """[H, D]: norms of the rows of the key projection."""
    projection = getattr(attention, "k_proj", None)
    weight = getattr(projection, "weight", None)
    if weight is None or not weight.is_floating_point() or weight.numel() == 0 or weight.is_meta:
        why = "has no k_proj" if projection is None else "has a k_proj whose weight is partitioned (ZeRO-3), packed or offloaded"
        raise UnsupportedError(
            f"{type(attention).__name__} {why}, by which a calibration or a trained part knows its model; use methods without one"
        )
    return weight.detach().double().view(num_kv_heads, -1, weight.shape[1]).norm(dim=-1)


# ---- sessions -----------------------------------------------------------------------------------------------------------------------


def marks_of(host: Host) -> tuple[dict[str, Tensor], str]:
    """By what a saved session knows its model. "norms LAYER" [H, D] f64, which other hosts of the model have too, where a layer has a key
    projection of its own; and a digest of the weights of attention and embedding, which are whole on every rank.

    Sync: reads these weights. Raises: UnsupportedError for weights that are not here.
    """
    norms = {}
    for i, (spec, attention) in enumerate(zip(host.specs, host.attentions, strict=True)):
        if getattr(attention, "k_proj", None) is not None:
            norms[f"norms {i}"] = key_norms(attention, spec.num_kv_heads).cpu()
    modules = {f"layer {i}": attention for i, attention in enumerate(host.attentions)}
    modules["embedding"] = host.model.get_input_embeddings()
    weights = [(f"{at}.{name}", p) for at, module in modules.items() for name, p in module.state_dict().items()]
    gone = [name for name, p in weights if p.is_meta or not p.numel()]
    if gone:
        raise UnsupportedError(
            f"weights of {host.name} are partitioned or offloaded ({gone[0]}), by which a saved session knows its model; gather them first"
        )
    return norms, f"{digest([_ints(p) for _, p in sorted(weights, key=lambda one: one[0])]):016x}"


def _ints(x: Tensor) -> Tensor:
    """The same bits, of a type that a digest takes."""
    x = x.detach()
    return x if x.dtype != torch.complex64 else torch.view_as_real(x)


def check_marks(host: Host, saved: dict[str, Tensor], weights: str | None, path: str) -> None:
    """weights: None for a file that another host has written. Raises: SessionError for a session of another model."""
    norms, own = marks_of(host)
    check_norms(norms, saved, host.name, path)
    if weights is not None and weights != own:
        raise SessionError(f"{path!r} was saved with other weights than this {host.name} has; load the model that it was saved with")

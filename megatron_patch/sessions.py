"""Save and load the requests of a static context, in the file that transformers' side of the same model writes. B rows, C columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from pikv_ds.cache import copies
from pikv_ds.cache.cache import PiKVCache
from pikv_ds.cache.copies import HostPart
from pikv_ds.errors import SessionError, UnsupportedError
from pikv_ds.sessions.marks import NORMS, check_norms

from .layers import Layer, first_head, is_latent, key_norms


class Context(Protocol):
    """A static context (context.py)."""

    core: PiKVCache
    layers: list[Layer]
    columns: int
    rows: list[int]
    padding: Tensor | None
    max_batch_size: int
    max_sequence_length: int

    def take_over(self, rows: int, columns: int) -> None: ...


def save(context: Context, path: str | Path, note: dict[str, Any] | None) -> int:
    """As PiKVInferenceContext.save."""
    if context.padding is not None:
        raise UnsupportedError(
            "requests with padding can't be saved here: Megatron's positions count padding, and those of a session do not; prefill up to "
            "the shortest prompt and feed the rest token by token, as StaticInferenceEngine does"
        )
    rows = len(context.rows)
    about = {"columns": context.columns, "lens": [context.columns] * rows, "parked": 0, "model": "Megatron-Core", "held": None}
    norms = {}
    for i, layer in enumerate(context.layers):
        own = _norms(layer)
        if own is None or own.shape[0] != context.core.layers[i].num_kv_heads:
            raise UnsupportedError(
                f"layer {i}: this rank has not all key projections of the model (tensor parallelism, or multi-latent attention), by which "
                f"a session knows it; save it without tensor parallelism, or from transformers"
            )
        norms[f"{NORMS}{i}"] = own
    return copies.save(context.core, path, HostPart(norms, about | {"weights": None, "note": note}))


def load(context: Context, path: str | Path) -> dict[str, Any] | None:
    """As PiKVInferenceContext.load."""

    def fits(part: HostPart) -> None:
        about = part.about
        if about["parked"] or "column_mask" in part.tensors:
            raise SessionError(f"{str(path)!r} has rows that are parked or padded, which a static context does not take")
        if len(about["lens"]) > context.max_batch_size or about["columns"] > context.max_sequence_length:
            raise SessionError(
                f"{str(path)!r} has {len(about['lens'])} rows of {about['columns']} tokens, the context is made for "
                f"{context.max_batch_size} of {context.max_sequence_length}; make a larger one"
            )
        _check_norms(context, part.tensors, str(path))

    about = copies.load(context.core, path, fits).about
    context.take_over(len(about["lens"]), about["columns"])
    return about["note"]


def _check_norms(context: Context, saved: dict[str, Tensor], path: str) -> None:
    """Each rank looks at the heads that it computes."""
    own, known = {}, {}
    for i, layer in enumerate(context.layers):
        norms = _norms(layer)
        if norms is None:
            raise SessionError(f"{path!r}: layer {i} has no key projection of its own (multi-latent attention), by which the file is known")
        own[f"{NORMS}{i}"] = norms
        first = first_head(layer.attention)
        of_model = saved.get(f"{NORMS}{i}")
        if of_model is not None:
            known[f"{NORMS}{i}"] = of_model[first : first + norms.shape[0]]
    known |= {name: x for name, x in saved.items() if name.startswith(NORMS) and name not in own}
    check_norms(own, known, "the Megatron model", path)


def _norms(layer: Layer) -> Tensor | None:
    """[H, D] f64 of this rank's heads; None: the layer has none."""
    return None if is_latent(layer.attention) else key_norms(layer.attention).to("cpu", torch.float64)

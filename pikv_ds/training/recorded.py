"""What parts learn from: windows of tokens, and what every layer of the frozen model computed for them. Hosts record (adapters/).

T tokens, Hq query heads, H kv heads, D their width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from pikv_ds.codecs.part_file import TrainedLayer
from pikv_ds.spec import LayerSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWindow:
    """One layer of a window, of the model's dtype and device, without gradients."""

    q: Tensor
    """[T, Hq, Dk], after RoPE."""
    k: Tensor
    """[T, H, Dk], after RoPE, as it is stored."""
    v: Tensor
    """[T, H, Dv]."""
    hidden: Tensor
    """[T, W]: what the attention module was given, after the norm before it."""
    scale: float
    """Of the softmax: logits are scale q k."""
    softcap: float | None = None
    """Bounds the logits, c tanh(logit / c); None = nothing does."""
    window: int | None = None
    """Tokens that a query sees, its own included; None = all before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """T tokens at positions 0 to T - 1 of a request of its own."""

    ids: Tensor
    """[T] int64."""
    question: Tensor
    """[T] bool: the token asks for, or answers with, what came before, as users do after a long text. All False in plain text."""
    layers: tuple[LayerWindow, ...]


class Windows(Protocol):
    """Recorded when they are asked for, or kept; the same window for the same index, always and on every rank."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Window: ...


class ModelFacts(NamedTuple):
    """What a part is built for."""

    layers: tuple[LayerSpec, ...]
    num_q_heads: tuple[int, ...]
    hidden: int

    @classmethod
    def of(cls, layers: Sequence[LayerSpec], window: Window) -> ModelFacts:
        """layers: of the model; what these do not say is read off a window."""
        return cls(tuple(layers), tuple(layer.q.shape[1] for layer in window.layers), window.layers[0].hidden.shape[-1])

    @property
    def trained_layers(self) -> tuple[TrainedLayer, ...]:
        """As files name them."""
        pairs = zip(self.layers, self.num_q_heads, strict=True)
        return tuple(TrainedLayer(spec.num_kv_heads, spec.k_dim, spec.v_dim, heads) for spec, heads in pairs)

"""The attention layers of a Megatron-Core model on this rank, with their routers and KV geometry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.transformer.utils import is_layer_window_attention
from torch import nn

from pikv_ds.errors import UnsupportedError
from pikv_ds.spec import LayerSpec

if TYPE_CHECKING:
    from .context import PiKVInferenceContext


@dataclass(slots=True)
class Link:
    """Shared by the attention and the router of one layer: which context the running forward uses. Not a module, so in no checkpoint."""

    layer: int
    context: PiKVInferenceContext | None = None


@dataclass(frozen=True, slots=True)
class Layer:
    """One transformer layer with self-attention; moe is None in a dense layer."""

    attention: SelfAttention
    moe: MoELayer | None

    @property
    def router(self) -> nn.Module | None:
        return None if self.moe is None else self.moe.router


def find_layers(model: nn.Module) -> list[Layer]:
    """In forward order; the model may be wrapped (Float16Module, DDP).

    Raises: UnsupportedError for attention that PiKV does not handle.
    """
    layers = []
    for module in model.modules():
        if not isinstance(module, TransformerLayer):
            continue
        if not isinstance(module.cross_attention, IdentityOp):
            raise UnsupportedError(f"layer {module.layer_number} has cross-attention; PiKV handles decoder-only models")
        if isinstance(module.self_attention, IdentityOp):
            continue
        if not isinstance(module.self_attention, SelfAttention):
            raise UnsupportedError(
                f"layer {module.layer_number} has {type(module.self_attention).__name__}; this version handles SelfAttention and its subclasses "
                f"(MLASelfAttention is not there yet)"
            )
        layers.append(Layer(module.self_attention, module.mlp if isinstance(module.mlp, MoELayer) else None))
    if not layers:
        raise UnsupportedError(f"{type(model).__name__} has no Megatron-Core TransformerLayer with self-attention")
    return layers


def check_routers(layers: list[Layer], source: str) -> None:
    """Routers must be TopKRouter, unless ids are hashed and no router is read."""
    for layer in layers:
        if layer.router is not None and not isinstance(layer.router, TopKRouter) and source != "hash":
            raise UnsupportedError(
                f"layer {layer.attention.layer_number} routes with {type(layer.router).__name__}, not TopKRouter; set pikv.storage.expert_ids = 'hash'"
            )


def layer_spec_of(layer: Layer, layer_idx: int) -> LayerSpec:
    """KV geometry of one layer on this rank: its own heads only, after the tensor-parallel split."""
    attention, config = layer.attention, layer.attention.config
    window = None
    if is_layer_window_attention(config.window_size, config.window_attn_skip_freq, attention.layer_number):
        left, right = config.window_size
        if left < 1 or right != 0:
            raise UnsupportedError(f"window_size = {config.window_size}: PiKV handles causal windows (left >= 1, right = 0)")
        window = left + 1  # Megatron counts the tokens before the query, LayerSpec counts the query too
    return LayerSpec(
        layer_idx=layer_idx, num_kv_heads=attention.num_query_groups_per_partition, k_dim=attention.key_hidden_size,
        v_dim=attention.val_hidden_size, window=window,
    )

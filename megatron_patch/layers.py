"""The attention layers of a Megatron-Core model on this rank, with their routers and KV geometry."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlock
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor, nn

from pikv_ds.cache.cache import PiKVCache
from pikv_ds.errors import ConfigError, UnsupportedError
from pikv_ds.spec import LayerSpec

from .link import Link
from .subclass import is_pikv
from .version import check_feature


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer with self-attention and the MoE layer that homes its entries: its own, or in a hybrid stack, whose layers are attention or
    experts, the one that follows before the next attention. moe is None where there is none."""

    attention: SelfAttention | MLASelfAttention
    moe: MoELayer | None
    alone: bool = False  # the layer is attention alone, as in a hybrid stack

    @property
    def router(self) -> nn.Module | None:
        return None if self.moe is None else self.moe.router


def find_layers(model: nn.Module) -> list[Layer]:
    """In forward order; the model may be wrapped (Float16Module, DDP). Heads that predict further tokens are left out: they train only.

    Raises: UnsupportedError for attention that PiKV does not handle.
    """
    layers: list[Layer] = []
    heads = {id(part) for module in model.modules() if isinstance(module, MultiTokenPredictionBlock) for part in module.modules()}
    for module in model.modules():
        if not isinstance(module, TransformerLayer) or id(module) in heads:
            continue
        moe = module.mlp if isinstance(module.mlp, MoELayer) else None
        if not isinstance(module.cross_attention, IdentityOp):
            raise UnsupportedError(
                f"layer {module.layer_number} has cross-attention, which Megatron-Core decodes without a cache; PiKV handles decoders alone"
            )
        if isinstance(module.self_attention, IdentityOp):
            if layers and layers[-1].moe is None:  # a hybrid stack: experts as a layer of their own
                layers[-1] = replace(layers[-1], moe=moe)
            continue
        if not isinstance(module.self_attention, SelfAttention | MLASelfAttention):
            raise UnsupportedError(
                f"layer {module.layer_number} has {type(module.self_attention).__name__}; PiKV handles SelfAttention, MLASelfAttention and "
                f"their subclasses"
            )
        refuse_attention(module.self_attention)
        layers.append(Layer(module.self_attention, moe, alone=isinstance(module.mlp, IdentityOp)))
    if not layers:
        raise UnsupportedError(f"{type(model).__name__} has no Megatron-Core TransformerLayer with self-attention")
    return layers


def is_later_stage(model: nn.Module) -> bool:
    """Whether the model is a pipeline stage that gets hidden states, not tokens."""
    return any(getattr(module, "pre_process", True) is False for module in model.modules())


def is_latent(attention: nn.Module) -> bool:
    return isinstance(attention, MLASelfAttention)


def refuse_attention(attention: nn.Module) -> None:
    """What PiKV can't do for one layer's attention, by the parts it was built from. Raises UnsupportedError."""
    if not is_latent(attention):
        return
    check_feature("multi-latent attention")
    if hasattr(attention.linear_kv_up_proj, "layer_norm_weight"):
        raise UnsupportedError(
            f"layer {attention.layer_number}: {type(attention.linear_kv_up_proj).__name__} normalises the latent inside the projection, "
            f"where PiKV can't read it; use a specification with a kv_layernorm of its own (get_gpt_layer_local_spec)"
        )


def check_routers(layers: list[Layer], source: str) -> None:
    """Routers must be TopKRouter, unless ids are hashed and no router is read."""
    for layer in layers:
        if layer.router is not None and not isinstance(layer.router, TopKRouter) and source != "hash":
            raise UnsupportedError(
                f"layer {layer.attention.layer_number} routes with {type(layer.router).__name__}, not TopKRouter; "
                f"set pikv.storage.expert_ids = 'hash'"
            )


def connect(layers: list[Layer], source: str) -> list[Link]:
    """One Link per layer, shared by its attention, its router and all contexts of the model. source: pikv.storage.expert_ids.

    Warns, when a model is first connected, of attention layers of a hybrid stack that no MoE layer follows.

    Raises: UnsupportedError for a router that was not enabled with its attention, from which ids would be missing.
    """
    links = []
    if layers[0].attention.pikv_link is None and source != "hash":
        _warn_of_no_experts([layer.attention.layer_number for layer in layers if layer.alone and layer.moe is None], source)
    for i, layer in enumerate(layers):
        router = layer.router if layer.router is not None and is_pikv(layer.router) else None
        if layer.router is not None and router is None and source != "hash":
            raise UnsupportedError(
                f"layer {layer.attention.layer_number} is enabled for PiKV, but not the router ({type(layer.router).__name__}) that names "
                f"its experts; give pikv_layer_spec the specification of the whole stack, or set pikv.storage.expert_ids = 'hash'"
            )
        if layer.attention.pikv_link is None:
            layer.attention.pikv_link = Link(i, router)
            if router is not None:
                router.pikv_link = layer.attention.pikv_link
        links.append(layer.attention.pikv_link)
    return links


def _warn_of_no_experts(numbers: list[int], source: str) -> None:
    if numbers:
        homed = "by the router of the nearest earlier layer that has one, else by position" if source == "previous_layer" else "by position"
        warnings.warn(
            f"no MoE layer follows the attention of layers {', '.join(map(str, numbers))} before the next attention: with "
            f"pikv.storage.expert_ids = {source!r} their entries are homed {homed}",
            UserWarning,
            stacklevel=5,
        )


def layer_spec_of(layer: Layer, layer_idx: int, shared: bool = False) -> LayerSpec:
    """KV geometry of one layer on this rank: its own heads after the tensor-parallel split, or all of them where the peers share them."""
    attention, config = layer.attention, layer.attention.config
    window = window_of(config, attention.layer_number)
    if is_latent(attention):
        rank = config.kv_lora_rank
        return LayerSpec(
            layer_idx=layer_idx, num_kv_heads=1, k_dim=rank + config.qk_pos_emb_head_dim, v_dim=rank, window=window, latent=True
        )
    return LayerSpec(
        layer_idx=layer_idx,
        num_kv_heads=config.num_query_groups if shared else attention.num_query_groups_per_partition,
        k_dim=attention.key_hidden_size,
        v_dim=attention.val_hidden_size,
        window=window,
        first_head=0 if shared else first_head(attention),
    )


def window_of(config: TransformerConfig, layer_number: int) -> int | None:
    """Tokens that a layer sees, the query's own included; None without a window. layer_number counts from 1."""
    if not is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
        return None
    left, right = config.window_size
    if left < 1 or right != 0:
        raise UnsupportedError(f"window_size = {config.window_size}: PiKV handles causal windows (left >= 1, right = 0)")
    return left + 1  # Megatron counts the tokens before the query, LayerSpec counts the query too


def first_head(attention: nn.Module) -> int:
    """Index, among the KV heads of the whole model, of the first that this tensor-parallel rank computes."""
    tp = attention.pg_collection.tp
    return tp.rank() * attention.config.num_query_groups // tp.size()


def key_norms(attention: nn.Module) -> Tensor:
    """[H, D] f64: norms of the rows of the key projection, of this rank's heads. A calibration knows its model by them."""
    if attention.config.num_query_groups < attention.pg_collection.tp.size():
        raise UnsupportedError(
            f"layer {attention.layer_number} cuts {attention.config.num_query_groups} KV heads over {attention.pg_collection.tp.size()} "
            f"tensor-parallel ranks, so no rank can check a calibration; use fewer ranks, or a codec without a calibration"
        )
    width, per_group = attention.key_hidden_size, attention.num_attention_heads_per_partition // attention.num_query_groups_per_partition
    if attention.val_hidden_size != width:
        raise UnsupportedError(f"layer {attention.layer_number}: keys and values differ in width; a calibration can't be checked")
    qkv = attention.linear_qkv.weight.detach().double()  # rows per KV head: its query heads, k, v
    return qkv.view(attention.num_query_groups_per_partition, per_group + 2, width, -1)[:, per_group].norm(dim=-1)


def check_calibration(core: PiKVCache, layers: list[Layer]) -> None:
    """Raises: ConfigError when what was fitted to a model was fitted to other weights; each rank looks at the heads that it computes."""
    for spec, rotation in zip(core.layers, core.rotations, strict=True):
        if rotation is not None:
            raise ConfigError(
                f"pikv.compression.rope = 'pre' (layer {spec.layer_idx}): under Megatron-Core this version does not undo rotations, whose "
                f"positions count padding there; legal is 'post'"
            )
    if core.blueprint.knows_model:
        for spec, layer in zip(core.layers, layers, strict=True):
            own = replace(spec, first_head=first_head(layer.attention), num_kv_heads=layer.attention.num_query_groups_per_partition)
            core.blueprint.check_model(own, key_norms(layer.attention))


def softmax_offset(attention: nn.Module) -> Tensor | None:
    """[Hq], the logit per head that takes a share of the softmax and gives nothing (TransformerConfig.softmax_type); None without one."""
    kind, offset = attention.config.softmax_type, getattr(attention.core_attention, "softmax_offset", None)
    if kind == "vanilla":
        return None
    if offset is None:
        raise UnsupportedError(
            f"softmax_type = {kind!r}, but {type(attention.core_attention).__name__} has no softmax_offset to take it from"
        )
    return offset.flatten()

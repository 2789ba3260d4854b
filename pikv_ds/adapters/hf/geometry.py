"""Heads and widths of a layer's keys and values: as its attention module has them, or as a configuration names them."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedConfig

# What modules call their projections of keys, of values, and of queries, keys and values in one; and their own numbers.
_KEYS, _VALUES = ("k_proj", "key", "key_proj", "wk"), ("v_proj", "value", "value_proj", "wv")
_WIDTHS, _HEADS = ("head_dim", "attention_head_size", "head_size"), ("num_key_value_heads", "num_kv_heads", "kv_heads")
_QUERY_HEADS = ("num_heads", "num_attention_heads")


def latent_of(module: nn.Module | None, config: PreTrainedConfig) -> dict | None:
    """Of a layer that keeps a latent (MLA); None for one that keeps keys and values."""
    rank = getattr(config if module is None else module, "kv_lora_rank", None)
    if rank is None or (module is not None and not hasattr(module, "qk_rope_head_dim")):
        return None
    rotated = (config if module is None else module).qk_rope_head_dim
    return {"num_kv_heads": 1, "k_dim": rank + rotated, "v_dim": rank, "latent": True}


def softcap_of(module: nn.Module | None, config: PreTrainedConfig) -> float | None:
    """By what a layer bounds its scores, where its attention does."""
    for owner in (module, config):
        if hasattr(owner, "attn_logit_softcapping"):
            return owner.attn_logit_softcapping
    return None


def of_configuration(config: PreTrainedConfig) -> dict:
    """Of one layer, as its configuration names them."""
    latent = latent_of(None, config)
    if latent is not None:
        return latent
    num_q_heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_q_heads
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        num_kv_heads = 1
    else:
        num_kv_heads = _first(config, _HEADS) or num_q_heads
    v_dim = getattr(config, "v_head_dim", None) or head_dim
    return {"num_kv_heads": num_kv_heads, "k_dim": head_dim, "v_dim": v_dim, "latent": False}


def of_module(module: nn.Module, config: PreTrainedConfig) -> dict:
    """Of one layer, from the widths of its projections; what these do not say is its own numbers, then the configuration."""
    named = of_configuration(config)
    k_dim = _first(module, _WIDTHS) or named["k_dim"]
    keys, values = _out_features(module, _KEYS), _out_features(module, _VALUES)
    if keys is not None and keys % k_dim == 0:
        heads = keys // k_dim
        v_dim = values // heads if values is not None and values % heads == 0 else getattr(module, "v_head_dim", None) or k_dim
        return {"num_kv_heads": heads, "k_dim": k_dim, "v_dim": v_dim, "latent": False}
    heads = _first(module, _HEADS) or _ungrouped(module) or named["num_kv_heads"]
    return {"num_kv_heads": heads, "k_dim": k_dim, "v_dim": getattr(module, "v_head_dim", None) or k_dim, "latent": False}


def first_head_of(module: nn.Module | None, config: PreTrainedConfig) -> int:
    """Index, among the KV heads of the whole model, of the first that this rank computes.

    A key projection that DeepSpeed's AutoTP has cut tells which part it is, tp_index of tp_world_size; the first parts have one head more
    where the number does not divide.
    """
    keys = _projection(module, _KEYS)
    each, more = divmod(of_configuration(config)["num_kv_heads"], getattr(keys, "tp_world_size", 1))
    place = getattr(keys, "tp_index", 0)
    return place * each + min(place, more)


def _ungrouped(module: nn.Module) -> int | None:
    """KV heads by the number of queries that share one, or as many as query heads where nothing says that they share."""
    num_q_heads = _first(module, _QUERY_HEADS)
    groups = getattr(module, "num_key_value_groups", 1)
    return None if num_q_heads is None else num_q_heads // groups


def _first(owner: object, names: tuple[str, ...]) -> int | None:
    return next((value for name in names if isinstance(value := getattr(owner, name, None), int) and value), None)


def _out_features(module: nn.Module, names: tuple[str, ...]) -> int | None:
    """Of the first of these projections, also under ZeRO-3 and quantised, where a weight's shape says nothing."""
    projection = _projection(module, names)
    if projection is None:
        return None
    if hasattr(projection, "tp_world_size"):  # a layer of AutoTP, which has its part of the weight and no numbers
        return getattr(projection.weight, "ds_shape", projection.weight.shape)[0]
    return _first(projection, ("out_features", "nf"))


def _projection(module: nn.Module | None, names: tuple[str, ...]) -> nn.Module | None:
    return next((part for name in names if isinstance(part := getattr(module, name, None), nn.Module)), None)

"""PiKV in a layer specification, for models that are built from one."""

from __future__ import annotations

import copy
from functools import partial
from unittest.mock import NonCallableMock

from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.errors import UnsupportedError

from .latent_attention import attention_class
from .penalty import RouterPenalty, check_router, chosen_penalty
from .refusals import refuse_config
from .router import router_class
from .subclass import is_pikv_class
from .version import check_feature

Spec = ModuleSpec | TransformerBlockSubmodules
HYBRID = ("attention_layer", "mla_layer", "moe_layer")  # of a stack whose layers are attention or experts: those that PiKV is in


def pikv_layer_spec(spec: Spec, config=None, *, router_penalty: RouterPenalty | None = None) -> Spec:
    """The same specification with PiKV's attention and router classes in front of its own; `spec` itself is not changed.

    Args:
        spec: a layer's ModuleSpec (local or Transformer Engine), the TransformerBlockSubmodules of a whole decoder, or the ModuleSpec of
            a HybridStack (MambaStack).
        config: the "pikv" block: PiKVConfig, dict, JSON path, or None for the defaults.
        router_penalty: the same as `routing.host_penalty` of the block; None = what the block says, off by default.

    Returns: a specification of the same kind; a model built from it has the same state_dict keys.

    Raises: UnsupportedError for another kind of object, and for attention or routers that PiKV does not handle.
    """
    check_feature("attention and routing")
    config = PiKVConfig.parse(config)
    refuse_config(config)
    router_penalty = chosen_penalty(config, router_penalty)
    if isinstance(spec, TransformerBlockSubmodules):
        spec = copy.copy(spec)
        spec.layer_specs = [_layer(layer, config, router_penalty) for layer in spec.layer_specs]
        return spec
    if isinstance(spec, ModuleSpec) and hasattr(spec.submodules, "attention_layer"):
        spec = copy.copy(spec)
        spec.submodules = copy.copy(spec.submodules)
        for name in HYBRID:
            layer = getattr(spec.submodules, name, IdentityOp)
            if layer is not IdentityOp:  # a kind of layer that the pattern does not use
                setattr(spec.submodules, name, _layer(layer, config, router_penalty))
        return spec
    return _layer(spec, config, router_penalty)


def _layer(spec: ModuleSpec, config: PiKVConfig, penalty: RouterPenalty | None) -> ModuleSpec:
    attention = getattr(getattr(spec, "submodules", None), "self_attention", None)
    if not isinstance(spec, ModuleSpec) or attention is None:
        raise UnsupportedError(
            f"pikv_layer_spec got a {_name_of(spec)}; give it the ModuleSpec of a TransformerLayer (get_gpt_layer_local_spec, "
            f"get_gpt_layer_with_transformer_engine_spec), TransformerBlockSubmodules (get_gpt_decoder_block_spec) or the ModuleSpec of a "
            f"HybridStack"
        )
    # A shallow copy of each changed level: the modules' submodules may hold classes and functions that are meant to be shared.
    spec = copy.copy(spec)
    spec.submodules = copy.copy(spec.submodules)
    if attention is not IdentityOp:
        spec.submodules.self_attention = _attention(attention, config)
    spec.submodules.mlp = _mlp(spec.submodules.mlp, config, penalty)
    return spec


def _name_of(spec) -> str:
    if isinstance(spec, ModuleSpec):
        return f"ModuleSpec of {getattr(spec.module, '__name__', spec.module)}"
    if isinstance(spec, partial):
        return f"partial of {getattr(spec.func, '__name__', spec.func)}"
    return type(spec).__name__


def _attention(attention: ModuleSpec, config: PiKVConfig) -> ModuleSpec:
    host = getattr(attention, "module", None)
    if not (isinstance(host, type) and issubclass(host, SelfAttention | MLASelfAttention)):
        raise UnsupportedError(
            f"the layer's self_attention is {getattr(host or attention, '__name__', host or attention)}; PiKV handles SelfAttention, "
            f"MLASelfAttention and their subclasses"
        )
    if is_pikv_class(host):
        raise UnsupportedError("the specification has PiKV's attention already; apply pikv_layer_spec once")
    if isinstance(getattr(attention.submodules, "core_attention", None), NonCallableMock):
        raise UnsupportedError(
            "the layer's core attention is a class of Transformer Engine, which is not installed (Megatron-Core has put a mock in its "
            "place); install transformer-engine, or use get_gpt_layer_local_spec"
        )
    attention = copy.copy(attention)
    attention.module = attention_class(host)
    attention.params = {**attention.params, "pikv_config": config}
    return attention


def moe_submodules(mlp) -> MoESubmodules | None:
    """Those of an MoE layer's specification: a ModuleSpec, or from 0.18 on a partial of MoELayer. None for a dense layer's."""
    found = mlp.keywords.get("submodules") if isinstance(mlp, partial) else getattr(mlp, "submodules", None)
    return found if isinstance(found, MoESubmodules) else None


def _mlp(mlp, config: PiKVConfig, penalty: RouterPenalty | None):
    submodules = moe_submodules(mlp)
    if submodules is None:
        return mlp
    router = submodules.router
    check_router(penalty, router)
    if not (isinstance(router, type) and issubclass(router, TopKRouter)):
        if config.storage.expert_ids == "hash":
            return mlp
        raise UnsupportedError(
            f"the layer routes with {getattr(router, '__name__', router)}, not TopKRouter; set pikv.storage.expert_ids = 'hash'"
        )
    submodules = copy.copy(submodules)
    submodules.router = partial(router_class(router), pikv_penalty=penalty)
    if isinstance(mlp, partial):
        return partial(mlp, submodules=submodules)
    mlp = copy.copy(mlp)
    mlp.submodules = submodules
    return mlp

"""Switch PiKV on and off in a model that is already built and loaded."""

from __future__ import annotations

from megatron.core.transformer.moe.router import TopKRouter
from torch import nn

from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.errors import UnsupportedError

from .attention import core_attention_class
from .latent_attention import attention_class
from .layers import check_routers, find_layers, layer_spec_of
from .penalty import RouterPenalty, check_penalty, check_router, chosen_penalty
from .placed import take_back
from .refusals import refuse_config, refuse_model
from .router import router_class
from .subclass import is_pikv, put_on, take_off
from .version import check_feature


def enable_pikv(model: nn.Module, config=None, *, router_penalty: RouterPenalty | None = None) -> nn.Module:
    """Let the attention layers of `model` use a PiKVInferenceContext. In place; parameters, buffers and state_dict keys stay as they are.

    Args:
        model: a Megatron-Core model with TransformerLayers (GPTModel), wrapped or not.
        config: the "pikv" block: PiKVConfig, dict, JSON path, or None for the defaults.
        router_penalty: the same as `routing.host_penalty` of the block; None = what the block says, off by default.

    Returns: the same model. Forwards without a context, training included, run the host's code.

    Raises:
        UnsupportedError: a Megatron-Core version, layer or setting that PiKV can't honour; the model is left as it was.
        ConfigError: a "pikv" block that is not legal here.
    """
    check_feature("attention and routing")
    config = PiKVConfig.parse(config)
    refuse_config(config)
    layers = find_layers(model)
    refuse_model(model, layers[0].attention.config)
    check_routers(layers, config.storage.expert_ids)
    router_penalty = chosen_penalty(config, router_penalty)
    check_penalty(router_penalty, layers[0].attention.config)
    for layer in layers:
        check_router(router_penalty, layer.router)
    for i, layer in enumerate(layers):
        layer_spec_of(layer, i)  # refuses windows it can't express
    if any(is_pikv(layer.attention) for layer in layers):
        raise UnsupportedError(
            f"{type(model).__name__} is enabled already (or was built from a pikv_layer_spec); call disable_pikv(model) first"
        )
    for layer in layers:
        put_on(layer.attention, attention_class)
        layer.attention.pikv_config = config
        put_on(layer.attention.core_attention, core_attention_class)
        if isinstance(layer.router, TopKRouter):
            put_on(layer.router, router_class)
            layer.router.pikv_penalty = router_penalty
    return model


def disable_pikv(model: nn.Module) -> nn.Module:
    """The host's classes again, also for a model built from a pikv_layer_spec. Idempotent; contexts made for the model end here.

    Experts that have moved stay where they are, with their routers' rows: the model is the same function, and its checkpoints have them in
    that order from then on.
    """
    for layer in find_layers(model):
        take_off(layer.attention.core_attention)
        take_off(layer.attention)
        if layer.router is not None:
            take_off(layer.router)
            take_back(layer.moe)
    return model

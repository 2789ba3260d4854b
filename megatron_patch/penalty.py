"""The penalty of RouterPenalty on Megatron's TopKRouter: what it can't be combined with, and the weights of a chosen set."""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from pikv_ds.adapters.penalty import RouterPenalty
from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.errors import ConfigError, UnsupportedError


def chosen_penalty(config: PiKVConfig, given: RouterPenalty | None) -> RouterPenalty | None:
    """The penalty of the argument or of `routing.host_penalty`; None = the routers choose as the host's do."""
    named = RouterPenalty.named(config.routing.host_penalty)
    if given is not None and named is not None and given != named:
        raise ConfigError(f"router_penalty = {given} and pikv.routing.host_penalty = {named}: two different penalties; give one of them")
    return named if given is None else given


def check_penalty(penalty: RouterPenalty | None, config: TransformerConfig) -> None:
    """Raises UnsupportedError for a dense model, and for routing in which the model's own weights of a chosen set can't be formed."""
    if penalty is None:
        return
    if not config.num_moe_experts:
        raise ConfigError(f"{penalty} on a dense model: it has no expert router that could heed it; leave the penalty out")
    if penalty.applies_to != "selection":
        return
    reasons = {
        "moe_expert_capacity_factor": config.moe_expert_capacity_factor is not None,
        "moe_router_load_balancing_type": config.moe_router_load_balancing_type == "sinkhorn",
    }
    for name, set_ in reasons.items():
        if set_:
            raise UnsupportedError(
                f"RouterPenalty(applies_to='selection') with TransformerConfig.{name} = {getattr(config, name)!r}: the weights of the "
                f"chosen experts are not a function of their scores alone; use applies_to='selection_and_weights'"
            )


def check_router(penalty: RouterPenalty | None, router: object) -> None:
    """router: a class, an instance or None (a dense layer). Raises UnsupportedError for one that PiKV does not subclass."""
    kind = router if isinstance(router, type) else type(router)
    if penalty is not None and router is not None and not issubclass(kind, TopKRouter):
        raise UnsupportedError(f"{penalty} on a {kind.__name__}: PiKV lowers the logits of TopKRouter only; leave the penalty out")


def check_installed(config: PiKVConfig, model_config: TransformerConfig, routers: list) -> None:
    """A context's block asks for no penalty, or for the one that the model's routers were enabled with."""
    penalty = RouterPenalty.named(config.routing.host_penalty)
    check_penalty(penalty, model_config)
    for router in routers:
        if penalty is not None and router is not None and getattr(router, "pikv_penalty", None) != penalty:
            raise ConfigError(
                f"the context's pikv.routing.host_penalty = {penalty}, the model's routers were enabled with "
                f"{getattr(router, 'pikv_penalty', None)}; give the block to enable_pikv or pikv_layer_spec"
            )


def model_weights(logits: Tensor, routing_map: Tensor, config: TransformerConfig) -> Tensor:
    """The combine weights [tokens, E] that the model's own scores give to an already chosen set of experts.

    Args: logits [tokens, E]; routing_map [tokens, E] bool. Source: topk_routing_with_score_function of Megatron-Core 0.16.1.
    """
    if config.moe_router_score_function == "sigmoid":
        weights = torch.sigmoid(logits.float()).type_as(logits) * routing_map
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) if config.moe_router_topk > 1 else weights
    elif config.moe_router_pre_softmax:
        weights = torch.softmax(logits, dim=-1, dtype=torch.float32).type_as(logits) * routing_map
    else:
        weights = torch.softmax(logits.masked_fill(~routing_map, -torch.inf), dim=-1, dtype=torch.float32).type_as(logits)
    return weights * config.moe_router_topk_scaling_factor if config.moe_router_topk_scaling_factor else weights

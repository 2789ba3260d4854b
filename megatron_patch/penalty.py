"""A penalty on router scores from the state of the cache: off unless asked for. E experts, S shards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from pikv_ds.cache import PiKVCache
from pikv_ds.errors import ConfigError, UnsupportedError


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterPenalty:
    """What PiKVTopKRouter takes off an expert's logit while it serves a PiKV context; training and forwards without one are untouched.

    penalty_e = load * (entries of e's shard / mean over the shards - 1) + miss * log(1 + misses of e)

    load evens out how full the shards are, miss keeps tokens from experts whose entries had to be fetched (the paper's cache-aware
    router, -lambda log(1 + miss_e); nothing misses in an exact cache without tiers, so count them with context.add_misses).
    applies_to: "selection" chooses experts by the lowered scores and weighs them by the model's own; "selection_and_weights" lowers both.
    It changes which experts compute, so it changes the model's output: measure quality before you use it.
    """

    load: float = 0.0
    miss: float = 0.0
    applies_to: Literal["selection", "selection_and_weights"] = "selection"

    def __post_init__(self) -> None:
        if self.load < 0 or self.miss < 0:
            raise ConfigError(f"RouterPenalty(load={self.load}, miss={self.miss}): strengths are >= 0; 0 switches a term off")
        if self.applies_to not in ("selection", "selection_and_weights"):
            raise ConfigError(f"RouterPenalty(applies_to={self.applies_to!r}): legal: 'selection', 'selection_and_weights'")

    def refuse(self, config: TransformerConfig) -> None:
        """Raises UnsupportedError for routing in which the model's own weights of a chosen set can't be formed."""
        if self.applies_to != "selection":
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

    def of(self, core: PiKVCache, layer: int, misses: Tensor) -> Tensor:
        """[E] f32 for one layer; equal on all ranks, as long as misses [E] are. Sync: none."""
        penalty = torch.zeros(core.writer.num_experts, dtype=torch.float32, device=core.device)
        if self.load and core.num_shards > 1:
            load = core.tables.directory.load[layer].to(torch.float32)
            experts = torch.arange(penalty.numel(), device=core.device)
            shard = core.writer.placement.shard_of(layer, experts, torch.zeros_like(experts))
            mean = load.mean().clamp_min(1)
            penalty += self.load * (load[shard] / mean - 1) * (load.sum() > 0)
        if self.miss:
            penalty += self.miss * torch.log1p(misses)
        return penalty


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

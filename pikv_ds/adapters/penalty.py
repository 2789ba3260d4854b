"""A penalty on the scores of the host's own expert routers, from the state of the cache: off unless asked for. E experts, S shards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pikv_ds.cache.cache import PiKVCache
from pikv_ds.cache.shard_facts import ShardFacts, named_layer, shard_facts
from pikv_ds.config.routing import HostPenaltyConfig
from pikv_ds.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterPenalty:
    """What a host's router takes off an expert's logit while a forward runs through the cache; training and other forwards are untouched.

    penalty_e = load * (entries of e's shard / mean over the shards - 1) + miss * log(1 + misses of e)

    load evens out how full the shards are, miss keeps tokens from experts whose entries were read in vain or had to be fetched (the
    paper's cache-aware router, -lambda log(1 + miss_e); misses are counted by the KV router 'cache_aware' and by the cache's add_misses).
    applies_to: "selection" chooses experts by the lowered logits and weighs them by the model's own; "selection_and_weights" lowers both.
    It changes which experts compute, so it changes the model's output: measure quality before you use it.
    Source: PiKV, arXiv 2508.06526, table 1 (R_P), there on the choice of shards.
    """

    load: float = 0.0
    miss: float = 0.0
    applies_to: Literal["selection", "selection_and_weights"] = "selection"

    def __post_init__(self) -> None:
        if self.load < 0 or self.miss < 0:
            raise ConfigError(f"RouterPenalty(load={self.load}, miss={self.miss}): strengths are >= 0; 0 switches a term off")
        if self.applies_to not in ("selection", "selection_and_weights"):
            raise ConfigError(f"RouterPenalty(applies_to={self.applies_to!r}): legal: 'selection', 'selection_and_weights'")

    @classmethod
    def named(cls, block: HostPenaltyConfig) -> RouterPenalty | None:
        """That of `routing.host_penalty`; None when both strengths are 0."""
        return cls(load=block.load, miss=block.miss, applies_to=block.applies_to) if block.asked else None

    def of(self, facts: ShardFacts, misses: Tensor) -> Tensor:
        """[E] f32, what the router that names the entries of a layer takes off its logits. Sync: none. With one shard the load term is 0.

        Args: facts of that layer; misses [E] f32, those that the KV router does not count. Equal on all ranks, as long as misses are.
        """
        lowered = torch.zeros_like(misses)
        if self.load and facts.loads is not None:
            load = facts.loads
            lowered += self.load * (load[facts.shard_of] / load.mean().clamp_min(1) - 1) * (load.sum() > 0)
        if self.miss:
            lowered += self.miss * torch.log1p(misses if facts.misses is None else misses + facts.misses[facts.shard_of])
        return lowered


def penalty_of(penalty: RouterPenalty, core: PiKVCache, layer: int, misses: Tensor) -> Tensor:
    """[E] f32, what the router of a layer takes off its logits: 0 for a router that names nobody's entries. misses [L, E] f32, see `of`."""
    named = named_layer(core, layer)
    if named is None:
        return torch.zeros_like(misses[0])
    return penalty.of(shard_facts(core, named), misses[named])

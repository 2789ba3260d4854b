"""A penalty on the scores of the host's own expert routers, from the state of the cache: off unless asked for. E experts, S shards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pikv_ds.cache.cache import PiKVCache
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

    def of(self, core: PiKVCache, layer: int, misses: Tensor) -> Tensor:
        """[E] f32, what the router of a layer takes off its logits. Sync: none.

        It looks at the layer whose entries this router names: its own, or the next with expert_ids "previous_layer" (then the last router
        names nothing and loses nothing). With one shard the load term is 0.

        Args: misses [L, E] f32, those that the KV router does not count. Equal on all ranks, as long as misses are.
        """
        layer += core.config.storage.expert_ids == "previous_layer"
        lowered = torch.zeros_like(misses[0])
        if layer == len(core.layers):
            return lowered
        experts = torch.arange(lowered.numel(), device=core.device)
        shard = core.writer.placement.shard_of(layer, experts, torch.zeros_like(experts))
        if self.load and core.num_shards > 1:
            load = core.tables.directory.load[layer].to(torch.float32)
            lowered += self.load * (load[shard] / load.mean().clamp_min(1) - 1) * (load.sum() > 0)
        if self.miss:
            counted = None if core.selection is None else core.selection.router.missed(layer)
            lowered += self.miss * torch.log1p(misses[layer] if counted is None else misses[layer] + counted[shard])
        return lowered

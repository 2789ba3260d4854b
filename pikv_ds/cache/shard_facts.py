"""What a host may ask about the shards of a layer: where experts' entries go, how full the shards are, what was read in vain."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .cache import PiKVCache


class ShardFacts(NamedTuple):
    """Of all ranks and the same on them. E experts, S shards."""

    shard_of: Tensor
    """[E] int64 shard of each expert, for position 0."""
    loads: Tensor | None
    """[S] f32 entries; None = there is one shard."""
    misses: Tensor | None
    """[S] f32, as the KV router counts them; None = it does not."""


def shard_facts(cache: PiKVCache, layer: int) -> ShardFacts:
    """Sync: none."""
    experts = torch.arange(cache.writer.num_experts, device=cache.device)
    return ShardFacts(
        shard_of=cache.writer.placement.shard_of(layer, experts, torch.zeros_like(experts)),
        loads=cache.pages.directory.load[layer].to(torch.float32) if cache.num_shards > 1 else None,
        misses=None if cache.selection is None else cache.selection.router.missed(layer),
    )


def named_layer(cache: PiKVCache, layer: int) -> int | None:
    """The layer whose entries the router of `layer` names: its own or, with expert_ids "previous_layer", the next; None = no one's."""
    named = layer + (cache.config.storage.expert_ids == "previous_layer")
    return named if named < len(cache.layers) else None

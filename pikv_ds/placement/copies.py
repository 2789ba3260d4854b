"""Which ranks hold copies of which shards: of those that they read most. Pure, the same on every rank. S shards, G ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def with_copies(homes: Sequence[int], reads: Tensor, copies: int) -> tuple[tuple[int, ...], ...]:
    """Holders of every shard, first its home, where every rank holds copies of other ranks' shards.

    A shard with copies gets the lightest of its holders as its home, heavy shards first: a rank that holds no copy has it read there.

    Args:
        homes: [S] the rank that holds each shard, as many on every rank. reads: [G, S] f64 >= 0 on the host, what each rank reads of each.
        copies: that every rank holds, at most the shards of other ranks. Equal reads go to the lower shard.
    """
    held = [[home] for home in homes]
    for rank in range(reads.shape[0]):
        others = [shard for shard, home in enumerate(homes) if home != rank]
        for shard in sorted(others, key=lambda shard: (-float(reads[rank, shard]), shard))[:copies]:
            held[shard].append(rank)
    totals, light = reads.sum(0), [0.0] * reads.shape[0]
    for shard in sorted(range(len(homes)), key=lambda shard: (len(held[shard]), -float(totals[shard]), shard)):
        own = min(held[shard], key=lambda rank: (light[rank], rank != homes[shard], rank))
        light[own] += float(totals[shard])
        held[shard] = [own, *sorted(rank for rank in held[shard] if rank != own)]
    return tuple(map(tuple, held))


def loads_of_homes(loads: Tensor, holders: Sequence[Sequence[int]], num_ranks: int) -> Tensor:
    """[G] f64: loads [S] of the shards that each rank is the home of."""
    homes = torch.tensor([ranks[0] for ranks in holders])
    return torch.zeros(num_ranks, dtype=torch.float64).index_add_(0, homes, loads.to(torch.float64))

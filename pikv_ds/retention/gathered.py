"""Numbers of pages of all shards, on every rank the same."""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds.exchange.exchange import Exchange
from pikv_ds.placement.shard_map import ShardMap


def of_all_shards(
    score: Tensor, others: tuple[Tensor, ...], exchange: Exchange, shard_map: ShardMap, heads: int, what: str
) -> list[Tensor]:
    """score [L, R, S * H, C] f32 and others of that shape, int32, of the local shards -> the same of all shards, in shard order.

    One collective when there are several ranks, which must have the same L, R and C.
    """
    if exchange.size == 1:
        return [score, *others]
    gathered = exchange.all_gather(torch.stack([score.view(torch.int32), *others]), what)  # [G, n, L, R, S * H, C]
    score, *others = shard_map.in_shard_order(gathered.permute(1, 2, 3, 0, 4, 5).flatten(3, 4), 3, heads)
    return [score.contiguous().view(torch.float32), *others]

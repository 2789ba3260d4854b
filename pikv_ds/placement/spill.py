"""Which shard takes an entry whose own is full, decided on the device. N tokens, S shards."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Homes(NamedTuple):
    shard: Tensor  # [N] int64, the shard that stores each token
    spilled: Tensor  # [N] bool, tokens that did not get the shard they asked for


def spill(wanted: Tensor, valid: Tensor, load: Tensor, capacity: int | Tensor) -> Homes:
    """Give each token the shard it wants while that shard has room, the others to the least loaded shards.

    Every rank computes this from the same gathered ids and the same loads, so all agree without a message.

    Args:
        wanted: [N] int64 shards, tokens in the global order (source rank, row, position).
        valid: [N] bool; padding takes no room.
        load: [S] int64, entries already in each shard of this layer.
        capacity: entries one shard may hold, a number or 0-d int64; the caller guarantees load.sum() + valid.sum() <= S * capacity.

    Returns: Homes. Sync: none. Cost: one [N, S] integer table.
    """
    num_shards = load.numel()
    onehot = (wanted.unsqueeze(-1) == torch.arange(num_shards, device=wanted.device)) & valid.unsqueeze(-1)
    running = onehot.cumsum(0)  # [N, S]
    room = (capacity - load).clamp_min(0)
    over = valid & (running.gather(1, wanted.unsqueeze(-1)).squeeze(-1) > room[wanted])
    extra = water_fill(load + torch.minimum(running[-1], room), over.sum())
    turn = over.cumsum(0) - 1
    taken_over = torch.searchsorted(extra.cumsum(0), turn.clamp_min(0), right=True).clamp_max(num_shards - 1)
    return Homes(torch.where(over, taken_over, wanted), over)


def water_fill(load: Tensor, amount: Tensor) -> Tensor:
    """Spread `amount` units so that the lowest loads rise to a common level: the quota of each shard.

    What does not divide goes to the shards that started lowest, then to the lower index.


    Args: load [S] int64; amount 0-d int64 >= 0. Returns: [S] int64 quotas that sum to amount. Sync: none.
    """
    level, order = torch.sort(load, stable=True)
    index = torch.arange(level.numel(), device=load.device)
    needed = index * level - (level.cumsum(0) - level)  # units to raise shards 0..i-1 to the level of shard i
    filled = (needed <= amount).sum()  # this many of the lowest shards take part
    rest = amount - needed.gather(0, (filled - 1).view(1)).squeeze(0)
    base = level.gather(0, (filled - 1).view(1)).squeeze(0) + rest // filled
    quota = torch.where(index < filled, base - level + (index < rest % filled).to(level.dtype), 0)
    return torch.zeros_like(load).scatter_(0, order, quota)

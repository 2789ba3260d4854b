"""The best pages of each query over the shards of all ranks, exactly: keys that order pages without ties, and a page list from them.

Q queries, S local shards, C table columns, H kv heads (1 = the same pages for all), K listed pages.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .exchange import Exchange

PINNED = 0x7FFFFFFF  # in place of a score: above every float
NOTHING = torch.iinfo(torch.int64).min  # key of a page that must not be read


def page_keys(score: Tensor, readable: Tensor, pinned: Tensor, shards: slice, num_shards: int) -> Tensor:
    """Order pages by (pinned, score, lower shard, lower column): total, and the same however the shards lie on ranks.

    Args: score [Q, S, 1 or H, C] f32; readable [Q, S, C] bool; pinned [Q, S, C] bool; shards: the local ones among num_shards.

    Returns: [Q, 1 or H, S * C] int64, the higher the sooner read; NOTHING where not readable, or not pinned with a score of -inf or NaN.
    """
    bits = (score + 0.0).view(torch.int32)  # one zero, not two
    order = torch.where(pinned.unsqueeze(2), PINNED, bits ^ ((bits >> 31) & 0x7FFFFFFF))  # ascends with the float
    shard = torch.arange(shards.start, shards.stop, device=score.device)
    place = shard.unsqueeze(-1) * (2**31 // num_shards) + torch.arange(score.shape[-1], device=score.device)  # [S, C]
    taken = (readable & pinned).unsqueeze(2) | (readable.unsqueeze(2) & (score > -torch.inf))
    keys = torch.where(taken, (order.to(torch.int64) << 32) | (0x7FFFFFFF - place).unsqueeze(1), NOTHING)
    return keys.transpose(1, 2).flatten(2)


def best_pages(keys: Tensor, budget: Tensor, width: int, num_local: int, exchange: Exchange, what: str) -> Tensor:
    """The `budget` highest keys over all ranks, and every pinned page.

    Args:
        keys: [Q, H, S * C] of page_keys. budget: [Q] int64 pages, pinned ones included.
        width: most pages that a query can get, the same on all ranks. num_local: S.

    Returns: [Q * S, H, K] int32 columns of this rank's tables, -1 = none. Sync: none. With several ranks one all-gather of the best
    `width` keys of each: 8 * Q * H * width bytes.
    """
    local, index = keys.topk(min(width, keys.shape[-1]))
    best = local
    if exchange.size > 1:
        own = torch.nn.functional.pad(local, (0, width - local.shape[-1]), value=NOTHING)
        best = exchange.all_gather(own.contiguous(), what).permute(1, 2, 0, 3).flatten(2).topk(width).values
    num_pinned = (best >> 32 == PINNED).sum(-1)
    wanted = torch.maximum(budget.unsqueeze(-1), num_pinned).clamp(1, best.shape[-1])
    chosen = (local >= best.gather(-1, (wanted - 1).unsqueeze(-1))) & (local != NOTHING)
    if num_local == 1:
        return torch.where(chosen, index, -1).to(torch.int32)
    columns = keys.shape[-1] // num_local
    shard = torch.arange(num_local, device=index.device).view(1, -1, 1, 1)
    here = chosen.unsqueeze(1) & (index.div(max(columns, 1), rounding_mode="floor").unsqueeze(1) == shard)
    return torch.where(here, index.unsqueeze(1) % max(columns, 1), -1).to(torch.int32).flatten(0, 1)


def listed_pages(keys: Tensor, num_local: int) -> Tensor:
    """Every page whose key is not NOTHING: [Q * S, H, C] int32 columns, -1 = none."""
    keys = keys.unflatten(2, (num_local, -1)).transpose(1, 2)  # [Q, S, H, C]
    columns = torch.arange(keys.shape[-1], dtype=torch.int32, device=keys.device)
    return torch.where(keys != NOTHING, columns, -1).flatten(0, 1)

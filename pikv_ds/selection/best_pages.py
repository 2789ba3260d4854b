"""The best pages of each query over the shards of all ranks, exactly: keys that order pages without ties, and a page list from them.

Q queries, S local shards, C table columns, H kv heads (1 = the same pages for all), K listed pages.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from pikv_ds.exchange.exchange import Exchange
from pikv_ds.placement.shard_map import ShardMap
from pikv_ds.staging import sent

from .found import Choice

PINNED = 0x7F800000  # upper half of the key of a page that must be read: that of +inf
HIDDEN = ~0x7F800000 << 32 | 0xFFFFFFFF  # highest key of a page that must not be read: that of -inf


def page_keys(score: Tensor, hidden: Tensor, pinned: Tensor, shard_map: ShardMap) -> Tensor:
    """Order pages by (pinned, score, lower shard, lower column): total, and the same however the shards lie on ranks.

    Args: score [Q, S, 1 or H, C] f32 below +inf; hidden, pinned [Q, S, C] bool of the local shards.

    Returns: [Q, 1 or H, S * C] int64, the higher the sooner read; <= HIDDEN where hidden, or not pinned with a score of -inf.
    """
    score = score.masked_fill(pinned.unsqueeze(2), torch.inf).masked_fill_(hidden.unsqueeze(2), -torch.inf)
    bits = score.view(torch.int32)
    keys = bits.new_empty((*score.shape, 2))
    torch.bitwise_xor(bits, (bits >> 31) & 0x7FFFFFFF, out=keys[..., 1])  # ascends with the float
    keys[..., 0] = _tie_order(shard_map.local, shard_map.num_shards, score.shape[-1], score.device)
    return keys.view(torch.int64).squeeze(-1).transpose(1, 2).flatten(2)


@lru_cache(maxsize=4)
def _tie_order(shards: tuple[int, ...], num_shards: int, columns: int, device: torch.device) -> Tensor:
    """[S, 1, C] int32: the lower half of the keys, higher for lower shards and columns."""
    shard = sent(shards, torch.int32, device).view(-1, 1, 1)
    return 0x7FFFFFFF - (shard * (2**31 // num_shards) + torch.arange(columns, dtype=torch.int32, device=device))


def best_pages(keys: Tensor, budget: Tensor | None, width: int, num_local: int, exchange: Exchange, what: str) -> Choice:
    """The `budget` highest keys over all ranks, and every pinned page.

    Args:
        keys: [Q, H, S * C] of page_keys. budget: [Q] int64 pages, pinned ones included; None = width for all, which holds what is pinned.
        width: most pages that a query can get, the same on all ranks. num_local: S.

    Sync: none. With several ranks one all-gather of the best `width` keys of each: 8 * Q * H * width bytes.
    """
    local, index = keys.topk(min(width, keys.shape[-1]))
    best, last, top = local, None, None
    if exchange.size > 1:
        own = torch.nn.functional.pad(local, (0, width - local.shape[-1]), value=HIDDEN)
        gathered = exchange.all_gather(own.contiguous(), what)
        top = gathered[..., 0]  # [G, Q, H], the best key of each rank
        best = gathered.permute(1, 2, 0, 3).flatten(2).topk(width).values
    chosen = local > HIDDEN
    if budget is not None:
        num_pinned = (best >> 32 == PINNED).sum(-1)
        wanted = torch.maximum(budget.unsqueeze(-1), num_pinned).clamp(1, best.shape[-1])
        last = best.gather(-1, (wanted - 1).unsqueeze(-1))
    elif exchange.size > 1:
        last = best[..., -1:]
    if last is not None:
        chosen &= local >= last
    readers = None if top is None else (top > HIDDEN) & (top >= last.squeeze(-1))
    if num_local == 1:
        return Choice(torch.where(chosen, index, -1).to(torch.int32), readers)
    columns = keys.shape[-1] // num_local
    shard = torch.arange(num_local, device=index.device).view(1, -1, 1, 1)
    here = chosen.unsqueeze(1) & (index.div(max(columns, 1), rounding_mode="floor").unsqueeze(1) == shard)
    return Choice(torch.where(here, index.unsqueeze(1) % max(columns, 1), -1).to(torch.int32).flatten(0, 1), readers)


def listed_pages(keys: Tensor, num_local: int) -> Tensor:
    """Every page whose key is above HIDDEN: [Q * S, H, C] int32 columns, -1 = none."""
    keys = keys.unflatten(2, (num_local, -1)).transpose(1, 2)  # [Q, S, H, C]
    columns = torch.arange(keys.shape[-1], dtype=torch.int32, device=keys.device)
    return torch.where(keys > HIDDEN, columns, -1).flatten(0, 1)


def by_column(page_lse: Tensor, page_list: Tensor, columns: int) -> Tensor:
    """page_lse [N, Hq, K] of the listed columns page_list [N, 1 or H, K] (-1 = none) -> [N, Hq, columns], -inf where none was listed."""
    heads = page_lse.shape[1] // page_list.shape[1]
    index = torch.where(page_list >= 0, page_list, columns).to(torch.int64).repeat_interleave(heads, 1)
    return page_lse.new_full((*page_lse.shape[:2], columns + 1), -torch.inf).scatter_(2, index, page_lse)[..., :-1]

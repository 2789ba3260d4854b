"""The best pages of each query over the shards of all ranks, exactly: keys that order pages without ties, and a page list from them.

Q queries, S local shards, C table columns, H kv heads (1 = the same pages for all), K listed pages.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pikv_ds.exchange.exchange import Exchange
from pikv_ds.staging import sent

from .found import Choice

PINNED = 0x7F800000  # upper half of the key of a page that must be read: that of +inf
HIDDEN = ~0x7F800000 << 32 | 0xFFFFFFFF  # highest key of a page that must not be read: that of -inf


class Shards(Protocol):
    """Which shards the columns of keys belong to: those of a rank (ShardMap), or all (AllShards)."""

    @property
    def local(self) -> tuple[int, ...]:
        """Global numbers, ascending."""

    @property
    def num_shards(self) -> int: ...


class AllShards(NamedTuple):
    local: tuple[int, ...]
    num_shards: int

    @classmethod
    def of(cls, num_shards: int) -> AllShards:
        return cls(tuple(range(num_shards)), num_shards)


def page_keys(score: Tensor, hidden: Tensor, pinned: Tensor, shard_map: Shards) -> Tensor:
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
        gathered = exchange.all_gather(_filled(local, width).contiguous(), what)
        top = gathered[..., 0]  # [G, Q, H], the best key of each rank
        best = gathered.permute(1, 2, 0, 3).flatten(2).topk(width).values
    if budget is not None or exchange.size > 1:
        last = last_key(best, budget)
    readers = None if top is None else (top > HIDDEN) & (top >= last.squeeze(-1))
    return Choice(columns_from(local, index, last, num_local, keys.shape[-1] // num_local), readers)


def last_of_all(keys: Tensor, budget: Tensor | None, width: int) -> Tensor:
    """[Q, H, 1] int64: the key of the last page that `best_pages` would choose, from keys of the shards of all ranks. Sync: none."""
    return last_key(_filled(keys.topk(min(width, keys.shape[-1])).values, width), budget)


def best_from(keys: Tensor, last: Tensor, width: int, num_local: int) -> Tensor:
    """What `best_pages` chooses of the local shards, where it is known of which key on: last [Q, H, 1] int64. Sync: none."""
    local, index = keys.topk(min(width, keys.shape[-1]))
    return columns_from(local, index, last, num_local, keys.shape[-1] // num_local)


def last_key(best: Tensor, budget: Tensor | None) -> Tensor:
    """best [Q, H, width], the highest keys of all ranks, descending: the last of them that is chosen, [Q, H, 1]."""
    if budget is None:
        return best[..., -1:]
    num_pinned = (best >> 32 == PINNED).sum(-1)
    wanted = torch.maximum(budget.unsqueeze(-1), num_pinned).clamp(1, best.shape[-1])
    return best.gather(-1, (wanted - 1).unsqueeze(-1))


def columns_from(local: Tensor, index: Tensor, last: Tensor | None, num_local: int, columns: int) -> Tensor:
    """The columns of keys from `last` on: local and index [Q, H, K] as topk gives them -> [Q * S, H, K] int32, -1 = none."""
    chosen = local > HIDDEN if last is None else (local > HIDDEN) & (local >= last)
    if num_local == 1:
        return torch.where(chosen, index, -1).to(torch.int32)
    shard, columns = torch.arange(num_local, device=index.device).view(1, -1, 1, 1), max(columns, 1)
    here = chosen.unsqueeze(1) & (index.div(columns, rounding_mode="floor").unsqueeze(1) == shard)
    return torch.where(here, index.unsqueeze(1) % columns, -1).to(torch.int32).flatten(0, 1)


def _filled(keys: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(keys, (0, width - keys.shape[-1]), value=HIDDEN)


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

"""Partials go back only from the ranks that read something (pikv.routing.exchange = "needed").

G ranks, M queries of all sources in order, H kv heads that choose for themselves (1 = all heads alike), Hq query heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds.config.routing import RoutingConfig
from pikv_ds.exchange.exchange import Exchange
from pikv_ds.routers.base import PageQuery


def return_needed(partials: Tensor, readers: Tensor, sizes: list[int], exchange: Exchange, what: str) -> Tensor:
    """Send every source the partials of its queries and heads that this rank has read for.

    Args:
        partials: [M, Hq, Dv + 1] f32, out and lse of all queries on this rank. readers: [G, M, H] bool, equal on all ranks: whose partials
            count; the others must be 0 with lse -inf. sizes: queries of every source, M in all.

    Returns: [G, own M, Hq, Dv + 1] f32, 0 and lse -inf where a rank has sent nothing: the same as if all had been sent.
    Sync: reads the sizes, G * G integers; on CPU that is free. One all-to-all of Hq / H * (Dv + 1) * 4 bytes per query, head and reader.
    """
    num_heads, rank = readers.shape[2], exchange.rank
    rows = torch.stack([of_source.sum((1, 2)) for of_source in readers.split(sizes, 1)], 1).tolist()  # [reader][source]
    blocks = partials.reshape(partials.shape[0] * num_heads, -1)
    sent = blocks.index_select(0, _first(readers[rank].flatten(), sum(rows[rank])))
    got = exchange.all_to_all_rows(sent, rows[rank], [of_reader[rank] for of_reader in rows], what)
    own = readers.split(sizes, 1)[rank]
    whole = partials.new_zeros(own.shape[0], sizes[rank], *partials.shape[1:])
    whole[..., -1] = -torch.inf
    whole.view(-1, blocks.shape[1]).index_copy_(0, _first(own.flatten(), got.shape[0]), got)
    return whole


def readers_of_shards(named: Tensor, asked: PageQuery, config: RoutingConfig, source: int | None = None) -> Tensor:
    """Ranks with a shard that a router names, or that holds a sink or recent token, whether there are pages of it or not.

    Args: named [M, S] bool, shards of all ranks. source: whose queries they are, who reads the copies that it holds.

    Returns: [G, M, 1] bool, the same on every rank. Sync: none.
    """
    num_shards, device = named.shape[1], named.device
    if asked.homes is not None:
        recent = asked.positions.unsqueeze(1) - torch.arange(config.recent_tokens, device=device)
        sinks = torch.arange(config.sink_tokens, device=device).expand(recent.shape[0], -1)
        pinned = torch.cat([sinks, recent], 1).clamp_max(asked.homes.shape[1] - 1)
        row = (asked.row_of_query() - asked.rows.start).unsqueeze(1)
        home = torch.where(pinned >= 0, asked.homes[row, pinned.clamp_min(0).long()].long(), -1)
        named = named | (home.unsqueeze(-1) == torch.arange(num_shards, device=device)).any(1)
    if asked.map.copied:
        reads = asked.map.readers[source] == torch.arange(asked.map.num_ranks, device=device).unsqueeze(1)  # [G, S]
        return (named.unsqueeze(0) & reads.unsqueeze(1)).any(-1, keepdim=True)
    by_rank = named if asked.map.contiguous else named.index_select(1, asked.map.by_rank)
    return by_rank.unflatten(1, (asked.map.num_ranks, -1)).any(-1).T.unsqueeze(-1)


def _first(mask: Tensor, count: int) -> Tensor:
    """The places of the `count` True ones of a mask, in order."""
    return (~mask).to(torch.int8).argsort(stable=True)[:count]

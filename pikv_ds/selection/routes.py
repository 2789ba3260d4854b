"""A query's way with pikv.routing.exchange "routed": its own rank chooses the shards, those that hold them read.

The rank that runs a request has made all of its keys, so what a router of shards keeps of a request (its means, counts, memories) is whole
there and nowhere else: it is kept up from the keys of the request itself, and costs no message. Where entries lie is the directory's, which
all ranks have. G ranks, M queries, S shards of all ranks, L local ones, C table columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds.errors import UnsupportedError
from pikv_ds.pages.events import Written
from pikv_ds.pages.view import PageView, Read
from pikv_ds.routers.base import PageQuery
from pikv_ds.step.query import Query
from pikv_ds.step.step import Step

from .best_pages import listed_pages, page_keys
from .extent import extent_of
from .returns import readers_of_shards
from .selection import QUERIES_AT_ONCE, Selection, blocks


def tell_own(selection: Selection, step: Step, layer: int, k: Tensor, valid: Tensor, shard: Tensor) -> None:
    """The router is told of this rank's own entries, in whatever shard. k [n, Hkv, Dk], valid [n] bool, shard [n] int64. Sync: none."""
    num_tokens, total = step.num_tokens, step.num_tokens * len(step.sources)
    own = slice(step.own * num_tokens, step.own * num_tokens + k.shape[0])
    keys = k.new_zeros(total, *k.shape[1:])
    stored, shards = valid.new_zeros(total), shard.new_zeros(total)
    keys[own], stored[own], shards[own] = k, valid, shard
    nowhere = torch.full((total,), -1, dtype=torch.int32, device=k.device)
    selection.news.wrote(layer, step, keys, Written(nowhere, shards, stored, torch.zeros_like(stored)))


def check_unwatched(selection: Selection) -> None:
    """Raises: UnsupportedError where somebody wants to see whole choices, or what they leave out."""
    if selection.watched:
        raise UnsupportedError(
            "pikv.routing.exchange = 'routed' reads on the ranks that hold a query's pages alone, so nobody sees a whole choice and what "
            "was left out is not known; measure with exchange 'all', which reads the same pages"
        )


def choose_ranks(selection: Selection, step: Step, query: Query) -> tuple[Tensor, Tensor]:
    """The shards that this rank's own queries read, and the ranks that hold these and the pinned tokens.

    Returns: [n, S] bool and [G, n] bool, n = B * T; no rank for padding. Sync: none.
    """
    source, q, router = step.sources[step.own], query.q, selection.router
    positions = own_positions(step).view(source.num_rows, source.num_columns)
    rows, pool = slice(source.row0, source.row0 + source.num_rows), selection.pages.layers[query.layer].routed
    for memory in router.memories:
        memory.tentative = step.tentative
    named, ranks = [], []
    for begin, end in blocks(source.num_columns):
        nothing = positions.new_zeros(source.num_rows * (end - begin), 1, 0)
        asked = PageQuery(
            layer=query.layer, rows=rows, q=q[:, begin:end].flatten(0, 1).contiguous(), positions=positions[:, begin:end].flatten(),
            pool=pool, block_table=nothing, seqlens=nothing, tail=None, tail_rows=None, visible=nothing, hidden=nothing, first=nothing,
            last=nothing, entries=nothing, pinned=nothing, map=selection.pages.map,
            homes=selection.pages.directory.shard_at[query.layer][rows], window=selection.pages.specs[query.layer].window,
            scale=query.scale, gather=_no_gather,
        )  # fmt: skip
        own = router.chosen_shards(asked)
        readers = readers_of_shards(own, asked, selection.config, step.own).squeeze(-1) & (asked.positions >= 0)
        named.append(own.unflatten(0, (source.num_rows, -1)))
        ranks.append(readers.unflatten(1, (source.num_rows, -1)))
    return torch.cat(named, 1).flatten(0, 1), torch.cat(ranks, 2).flatten(1, 2)


def own_positions(step: Step) -> Tensor:
    """[n] int32 of this rank's tokens."""
    return step.positions.view(len(step.sources), -1)[step.own, : step.sources[step.own].num_tokens]


def _no_gather(x: Tensor) -> Tensor:
    raise UnsupportedError("a router that gathers from all ranks has no place in pikv.routing.exchange = 'routed'; use 'all'")


def read_arrived(
    selection: Selection, step: Step, query: Query, q: Tensor, tokens: Tensor, named: Tensor, view: PageView
) -> tuple[Tensor, Tensor]:
    """Attention of queries that have arrived to the pages of this rank that they read.

    Args: q [M, Hq, Dk]; tokens [M] int32 (-1 = none); named [M, S] bool; view: the tables of all rows.

    Returns: out [M, Hq, Dv] f32, lse [M, Hq] f32, 0 and -inf where nothing was read. Sync: none.
    """
    at_once = 8 * QUERIES_AT_ONCE
    there = tokens >= 0
    token = tokens.clamp_min(0).long()
    rows, at = step.rows[token], torch.where(there, step.positions[token], -1)
    reads = [
        _read(selection, step, query, q[i : i + at_once], rows[i : i + at_once], at[i : i + at_once], named[i : i + at_once], view)
        for i in range(0, max(q.shape[0], 1), at_once)
        if q.shape[0]
    ]
    if not reads:
        return q.new_zeros(0, q.shape[1], query.v_dim, dtype=torch.float32), q.new_zeros(0, q.shape[1], dtype=torch.float32)
    return tuple(x[0] if len(x) == 1 else torch.cat(x) for x in zip(*(read[:2] for read in reads), strict=True))


def _read(selection: Selection, step: Step, query: Query, q: Tensor, rows: Tensor, at: Tensor, named: Tensor, view: PageView) -> Read:
    pages, pool = selection.pages, selection.pages.layers[query.layer].routed
    window, num_local = pages.specs[query.layer].window, pages.num_local
    columns = min(max(step.lens_after_host) // selection.page_size + 1, view.block_table.shape[-1])
    own = view._replace(block_table=view.block_table[..., :columns]).of_rows(rows, len(step.num_new))
    where = extent_of(
        pool, own.block_table, own.seqlens.view(-1, num_local, 1), at.view(-1, 1, 1), selection.config, window, selection.in_order
    )
    score = torch.zeros(where.visible.shape, dtype=torch.float32, device=q.device)
    score.masked_fill_(~pages.map.own(named, 1).unsqueeze(-1), -torch.inf)
    keys = page_keys(score.unsqueeze(2), where.hidden, where.pinned, pages.map)
    listed = listed_pages(keys, num_local)
    real = (at >= 0).to(torch.float64)
    selection.entries[0] += (
        torch.where(listed.view(where.entries.shape) >= 0, where.entries, 0).flatten(1).sum(1, dtype=torch.float64) @ real
    )
    return pool.reader.attend_listed(q, own, listed, scale=query.scale, window=window, q_positions=at)


def count_visible(selection: Selection, step: Step, query: Query, view: PageView) -> None:
    """Entries of this rank that the forward's queries could see, those that never came here among them."""
    pages, window = selection.pages, selection.pages.specs[query.layer].window
    positions, rows = step.positions, step.rows
    real = (positions >= 0).to(torch.float64)
    if window is None:
        held = view.seqlens.view(len(step.num_new), -1).sum(1, dtype=torch.float64)
        selection.entries[1] += held[rows] @ real
        return
    own = view.of_rows(rows, len(step.num_new))
    pool = pages.layers[query.layer].routed
    at = positions.view(-1, 1, 1)
    where = extent_of(pool, own.block_table, own.seqlens.view(-1, pages.num_local, 1), at, selection.config, window, selection.in_order)
    selection.entries[1] += where.entries.flatten(1).sum(1, dtype=torch.float64) @ real

"""Pages for decode queries that were chosen by the rank of the query: what it needs for that, and what the ranks that it asks read.

G ranks, B rows of this rank, M heads of queries that have come, S shards of all ranks, L local ones, C columns, Hq query heads, H heads of
a page list, each of which travels by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds.pages.view import PageView, Read
from pikv_ds.routers.base import PageQuery
from pikv_ds.step.query import Query
from pikv_ds.step.step import Step

from .best_pages import HIDDEN, AllShards, best_from, last_of_all, page_keys
from .extent import Extent, extent_of
from .outline import OutlinedPool
from .routes import own_positions
from .selection import QUERIES_AT_ONCE, Selection, real_queries

NOTHING = torch.iinfo(torch.int64).max  # a last key that no page has


def choose_here(selection: Selection, step: Step, query: Query) -> tuple[Tensor, Tensor]:
    """The last page that each of this rank's queries reads, by its key, and the ranks that have pages from there on.

    Returns: last [B, H] int64, [G, B, H] bool; no rank for padding. Sync: none.
    """
    pages, source = selection.pages, step.sources[step.own]
    if not source.num_rows:
        heads = pages.layers[query.layer].routed.fmt.num_kv_heads if selection.router.by_head else 1
        nobody = torch.zeros(pages.map.num_ranks, 0, heads, dtype=torch.bool, device=selection.device)
        return nobody[0].to(torch.int64), nobody
    outline, window = selection.routes.outlines[query.layer], pages.specs[query.layer].window
    at, rows = own_positions(step), slice(source.row0, source.row0 + source.num_rows)
    lens = outline.counts.view(-1, 1).to(torch.int32)
    where = outline.extent(at, selection.config, window)
    asked = _asked(query, rows, query.q.squeeze(1).contiguous(), at, outline.outlined, outline.table, lens, where, selection)
    num_shards = outline.counts.shape[1]
    score = selection.router.score(asked).view(source.num_rows, num_shards, -1, outline.columns)
    keys = page_keys(score, where.hidden, where.pinned, AllShards.of(num_shards))
    last = last_of_all(keys, *selection.budget_of(step, asked))
    best = keys.unflatten(2, (num_shards, -1)).amax(-1)  # [B, H, S]
    reads = (best >= last) & (best > HIDDEN) & (at >= 0).view(-1, 1, 1)
    by_rank = reads if pages.map.contiguous else reads.index_select(2, pages.map.by_rank)
    return last.squeeze(-1), by_rank.unflatten(2, (pages.map.num_ranks, -1)).any(-1).permute(2, 0, 1)


def read_chosen(
    selection: Selection, step: Step, query: Query, q: Tensor, last: Tensor, places: Tensor, units: int, view: PageView
) -> Tensor:
    """Attention of the heads that have come to the pages of this rank that they read.

    Args: q [M, Hq / H, Dk]; last [M] int64; places [M] int32 token * H + head, of all ranks' tokens; units: H; view: of all rows.

    Returns: [M, Hq / H, Dv + 1] f32, out and lse. Sync: how many queries they are.
    """
    if not len(q):
        return q.new_zeros(0, q.shape[1], query.v_dim + 1, dtype=torch.float32)
    unit = places.long() % units
    token, index = torch.unique(places.long() // units, return_inverse=True)
    whole_q, whole_last = q.new_zeros(len(token), units, *q.shape[1:]), last.new_full((len(token), units), NOTHING)
    whole_q[index, unit], whole_last[index, unit] = q, last
    rows, at, whole_q, at_once = step.rows[token], step.positions[token], whole_q.flatten(1, 2), 8 * QUERIES_AT_ONCE
    parts = [slice(i, i + at_once) for i in range(0, len(token), at_once)]
    reads = [_read(selection, step, query, whole_q[i], whole_last[i], rows[i], at[i], view) for i in parts]
    found = torch.cat([torch.cat([read.out, read.lse.unsqueeze(-1)], -1) for read in reads])
    return found.unflatten(1, (units, -1))[index, unit]


def _read(selection: Selection, step: Step, query: Query, q: Tensor, last: Tensor, rows: Tensor, at: Tensor, view: PageView) -> Read:
    pages, pool = selection.pages, selection.pages.layers[query.layer].routed
    window, num_local = pages.specs[query.layer].window, pages.num_local
    columns = min(max(step.lens_after_host) // selection.page_size + 1, view.block_table.shape[-1])
    own = view._replace(block_table=view.block_table[..., :columns]).of_rows(rows, len(step.num_new))
    table = own.block_table
    if pool.blocks > 1:
        table = (table.unsqueeze(-1) * pool.blocks + torch.arange(pool.blocks, dtype=torch.int32, device=table.device)).flatten(2)
    where = extent_of(pool, table, own.seqlens.view(-1, num_local, 1), at.view(-1, 1, 1), selection.config, window, False)
    asked = _asked(query, slice(0, len(rows)), q.contiguous(), at, pool, table, own.seqlens, where, selection)
    score = selection.router.score(asked).view(len(rows), num_local, -1, table.shape[-1])
    keys = page_keys(score, where.hidden, where.pinned, pages.map)
    listed = best_from(keys, last.unsqueeze(-1), selection.budget(step, query.layer).width, num_local)
    padded = torch.nn.functional.pad(where.entries, (0, 1)).view(-1, 1, table.shape[-1] + 1).expand(-1, listed.shape[1], -1)
    read = padded.gather(-1, listed.remainder(table.shape[-1] + 1).long()).view(len(rows), -1).sum(1, dtype=torch.float64)
    selection.entries[0] += read @ real_queries(asked) / listed.shape[1]
    return pool.reader.attend_listed(
        q, own, listed, scale=query.scale, window=window, q_positions=at, block_size=selection.block_size
    )  # fmt: skip


def _asked(
    query: Query, rows: slice, q: Tensor, at: Tensor, pool: OutlinedPool, table: Tensor, lens: Tensor, where: Extent, selection: Selection
) -> PageQuery:
    return PageQuery(
        layer=query.layer, rows=rows, q=q, positions=at, pool=pool, block_table=table, seqlens=lens, tail=None, tail_rows=None,
        **where._asdict(), map=selection.pages.map, homes=None, window=selection.pages.specs[query.layer].window, scale=query.scale,
        gather=selection.gather,
    )  # fmt: skip

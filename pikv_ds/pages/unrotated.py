"""Attention to pages that hold coefficients of un-rotated keys: decode, rotate by the stored positions, attend. Plain torch.

Between the up-projection and the query stands a rotation that differs from entry to entry, so U can't be folded into q
(pikv_ds/codecs/maps.py): the keys of the pages that are read are put together again, and queries and whatever looks at keys meet these. R
rows, T queries per row, S local shards, N = R * S tables, H kv heads, K columns that are read, P entries of a page. X is H where every head
has pages of its own (a list per head, or tables per head), else 1.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from pikv_ds import ops
from pikv_ds.codecs.rope import turn

from .pool import LayerStore
from .view import Before, Stored, stored_entries

NUMBERS_AT_ONCE = 1 << 25  # f32 of keys, values and scores that are held for a block of queries


class Rebuilt(NamedTuple):
    """Entries of pages as queries meet them, 0 where there is none."""

    k: Tensor
    """[N, H, K, P, D] f32, rotated."""
    v: Tensor
    """[N, H, K, P, r] f32, coefficients: what values are mapped by is folded into the output."""
    held: Tensor
    """[N, X, K, P] bool: an entry."""
    at: Tensor
    """[N, X, K, P] int32, its position; anything where none is held."""


def rebuild(store: LayerStore, stored: Stored, page_list: Tensor | None = None) -> Rebuilt:
    """The entries of the listed columns [N, 1 or H, K] int32 (-1 = none), or of all. Other pages are not read. Sync: none.

    store: with pages and `turned` maps.
    """
    table, page_size, maps = stored.block_table, store.page_size, store.turned
    columns = page_list
    if columns is None:
        columns = torch.arange(table.shape[2], device=table.device).expand_as(table)
    table, lens = table.expand(-1, columns.shape[1], -1), stored.seqlens.unsqueeze(-1)
    page = table.gather(2, columns.clamp_min(0).to(torch.int64)).clamp_min(0)  # [N, X, K]
    offset = torch.arange(page_size, device=table.device)
    slot = columns.unsqueeze(-1) * page_size + offset  # [N, X, K, P]
    held = (columns >= 0).unsqueeze(-1) & (slot < lens.unsqueeze(-1))
    c, v = _coefficients(store, page)
    if stored.tail is not None:
        raw = stored.tail.index_select(0, stored.tail_rows.flatten()).float()
        raw = raw.view(table.shape[0], c.shape[1], *raw.shape[2:])[:, :, offset % store.fmt.group]  # [N, H, P, r]
        is_open = held & (slot >= (lens - lens % store.fmt.group).unsqueeze(-1))
        c = torch.where(is_open.unsqueeze(-1), raw.unsqueeze(2), c)
    # What is not held must be finite: a weight of 0 times NaN would still be NaN.
    c, v = (torch.where(held.unsqueeze(-1), x, 0) for x in (c, v))
    at = store.positions[page]
    k = maps.k.invert(c.movedim(1, -2))  # [N, K, P, H, D]
    k = turn(k.unsqueeze(-2), at.movedim(1, -1), maps.inv_freq).squeeze(-2)
    return Rebuilt(torch.where(held.unsqueeze(-1), k.movedim(-2, 1), 0), v, held, at)


def read_turned(
    store: LayerStore,
    q: Tensor,
    rows: slice,
    before: Before | None,
    own_visible: Tensor | None,
    *,
    scale: float,
    window: int | None,
    q_positions: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attention of rotated queries q [R, T, Hq, D] to all entries of the rows `rows` in all local shards. One table for all heads.

    Args: as in reader.read_pages.

    Returns: out [R, T, Hq, r] f32, coefficients of values; lse [R, T, Hq] f32, complete; 0 and -inf where nothing is stored. Sync: none.
        Cost: all entries of the rows, H * (D + r) f32 numbers each, at a time.
    """
    read = rebuild(store, stored_entries(store, rows, before, own_visible))
    num_rows = q.shape[0]
    k, v = (x.unflatten(0, (num_rows, -1)).transpose(1, 2).flatten(2, 4) for x in (read.k, read.v))  # [R, H, S * K * P, D]
    mask = read.held.view(num_rows, 1, 1, -1)
    if window is not None:
        mask = mask & (read.at.view(mask.shape) > q_positions[:, None, :, None] - window)
    out, lse = ops.sdpa_lse(q.float().transpose(1, 2), k, v, scale=scale, mask=mask)
    return out.transpose(1, 2), lse.transpose(1, 2)


def attend(
    store: LayerStore,
    q: Tensor,
    stored: Stored,
    *,
    scale: float,
    page_list: Tensor | None = None,
    window: int | None = None,
    q_positions: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What ops.decode gives, for T queries that read the same tables: q [R, T, Hq, D], q_positions [R, T] int32 with a window.

    Returns: out [R, T, Hq, r] f32, lse [R, T, Hq] f32, page_lse [R, T, S, Hq, K] f32; 0 and -inf where nothing was read. Sync: none.
    """
    read, (num_rows, num_queries, num_q_heads, _) = rebuild(store, stored, page_list), q.shape
    k, v = (x.unflatten(0, (num_rows, -1)) for x in (read.k, read.v))  # [R, S, H, K, P, D]
    held, at = (x.unflatten(0, (num_rows, -1)).transpose(1, 2)[:, None, :, None] for x in (read.held, read.at))  # [R, 1, X, 1, S, K, P]
    q, step, parts = q.float().unflatten(2, (k.shape[2], -1)), max(1, NUMBERS_AT_ONCE // max(1, read.held[:, 0].numel() * num_q_heads)), []
    for begin in range(0, num_queries, step):
        logits = scale * torch.einsum("rthgd,rshcpd->rthgscp", q[:, begin : begin + step], k)
        visible = held
        if window is not None:
            visible = held & (at > q_positions[:, begin : begin + step].view(num_rows, -1, *[1] * 5) - window)
        logits = torch.where(visible, logits, -torch.inf)
        lse = logits.flatten(4).logsumexp(-1)
        weights = torch.exp(logits - lse.clamp_min(torch.finfo(torch.float32).min)[..., None, None, None])
        out = torch.einsum("rthgscp,rshcpv->rthgv", weights, v)
        parts.append((out.flatten(2, 3), lse.flatten(2, 3), logits.logsumexp(-1).movedim(4, 2).flatten(3, 4)))
    return parts[0] if len(parts) == 1 else tuple(torch.cat(pieces, 1) for pieces in zip(*parts, strict=True))


def decode(
    store: LayerStore,
    q: Tensor,
    stored: Stored,
    *,
    scale: float,
    page_list: Tensor | None = None,
    window: int | None = None,
    q_positions: Tensor | None = None,
    with_page_lse: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """ops.decode of whatever a store holds: one query [Q, Hq, D] for every S tables of `stored`.

    Of un-rotated keys in torch, and only of the listed pages: Cost as many f32 numbers as are read, for so many queries at a time that they
    are NUMBERS_AT_ONCE or of one query.
    """
    if store.turned is None:
        return ops.decode(
            q, store.pages, store.fmt, stored.block_table, stored.seqlens, scale=scale, page_list=page_list, q_positions=q_positions,
            window=window, tail=stored.tail, tail_rows=stored.tail_rows, with_page_lse=with_page_lse,
        )  # fmt: skip
    num_tables, columns = stored.block_table.shape[0], (stored.block_table if page_list is None else page_list).shape[2]
    if not store.num_pages:
        empty = q.new_zeros(*q.shape[:2], store.fmt.v_dim, dtype=torch.float32)
        lse = torch.full(q.shape[:2], -torch.inf, device=q.device)
        return empty, lse, lse.new_full((num_tables, q.shape[1], columns), -torch.inf) if with_page_lse else None
    shards = num_tables // q.shape[0]
    numbers = shards * columns * store.page_size * (store.fmt.num_kv_heads * (store.k_dim + store.fmt.v_dim) + 2 * q.shape[1])
    step, parts = max(1, NUMBERS_AT_ONCE // max(1, numbers)), []
    for begin in range(0, q.shape[0], step):
        queries, tables = slice(begin, begin + step), slice(begin * shards, (begin + step) * shards)
        part = Stored(*(None if x is None else x[tables] for x in (stored.block_table, stored.seqlens)), stored.tail, None)
        part = part._replace(tail_rows=None if stored.tail_rows is None else stored.tail_rows[tables])
        out, lse, page_lse = attend(
            store, q[queries].unsqueeze(1), part, scale=scale, page_list=None if page_list is None else page_list[tables], window=window,
            q_positions=None if q_positions is None else q_positions[queries].unsqueeze(1),
        )  # fmt: skip
        parts.append((out.squeeze(1), lse.squeeze(1), page_lse.flatten(0, 2)))
    out, lse, page_lse = parts[0] if len(parts) == 1 else (torch.cat(pieces) for pieces in zip(*parts, strict=True))
    return out, lse, page_lse if with_page_lse else None


def _coefficients(store: LayerStore, page: Tensor) -> tuple[Tensor, Tensor]:
    """c_k and c_v [N, H, K, P, r] f32 of the pages [N, X, K] as the records hold them."""
    fmt, heads = store.fmt, page.shape[1]
    if heads > 1 and fmt.num_kv_heads > 1:  # a list per head: of each page the section of that head alone
        sections = store.pages[:, : fmt.positions_offset].unflatten(1, (heads, -1))
        own = sections[page, torch.arange(heads, device=page.device).unsqueeze(-1)].flatten(0, 2)
        fmt = replace(fmt, num_kv_heads=1)
        records = torch.nn.functional.pad(own, (0, fmt.record_bytes - own.shape[1]))
    else:
        records = store.pages.index_select(0, page.flatten())
    return tuple(x.unflatten(0, page.shape).transpose(2, 3).flatten(1, 2) for x in ops.decode_pages(records, fmt))

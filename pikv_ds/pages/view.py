"""Attention to the pages of one layer on this rank. R rows, S local shards, T queries per row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pikv_ds import ops

from .pool import LayerStore

# From this many queries per row on, decoding the pages once into dense K and V costs less than reading them query by query.
# 4,096 entries, 1 thread: f32 crosses between 2 and 8 queries, bf16 between 4 and 32, the compressed formats above 32.
DENSE_FROM_RAW, DENSE_FROM_COMPRESSED = 5, 33


class Before(NamedTuple):
    """The store of a layer as it was before this forward's entries: counts [R, S] int32, and the raw tails (None: no groups)."""

    counts: Tensor
    tail: Tensor | None


class Stored(NamedTuple):
    """Tables of R rows as a reader sees them: block_table [R * S, 1, C], seqlens [R * S, 1]; raw tails and their rows, or None.

    With a page per kv head: [R * S, Hkv, C] and [R * S, Hkv], S shards.
    """

    block_table: Tensor
    seqlens: Tensor
    tail: Tensor | None
    tail_rows: Tensor | None


def stored_entries(store: LayerStore, rows: slice, before: Before | None, own_visible: Tensor | None) -> Stored:
    """The entries of the rows `rows` in all local shards.

    Args: before: what to see instead of the present entries. own_visible: [R] bool, rows that see the present ones all the same.
    """
    num_shards = store.counts.shape[1]
    tables = slice(rows.start * num_shards, rows.stop * num_shards)
    whole = rows.stop - rows.start == store.counts.shape[0]  # spares the views: each costs a microsecond per layer and step
    seqlens, block_table = (store.counts, store.block_table) if whole else (store.counts[rows], store.block_table[rows])
    tail = store.tail if whole or store.tail is None or store.full_pages else store.tail[tables]
    if before is not None:
        seqlens = torch.where(own_visible.unsqueeze(-1), seqlens, before.counts[rows])
        if before.tail is not None:
            own = own_visible.repeat_interleave(num_shards)[:, None, None, None]
            tail = torch.where(own, tail, before.tail[tables])
    if num_shards > 1:
        seqlens, block_table = seqlens.reshape(-1, store.heads), block_table.view(-1, store.heads, block_table.shape[-1])
    numbered = torch.zeros if store.full_pages else torch.arange
    tail_rows = None if tail is None else numbered(seqlens.numel(), dtype=torch.int32, device=tail.device)
    tail_rows = tail_rows if tail is None or store.heads == 1 else tail_rows.view_as(seqlens)
    return Stored(block_table, seqlens, tail, tail_rows)


def read_pages(
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
    """Attention of q [R, T, Hq, Dk] to the entries of the rows `rows` in all local shards.

    Args:
        before, own_visible: as in stored_entries. q_positions: [R, T] int32, needed with a window or more than one query.

    Returns: out [R, T, Hq, Dv] f32, lse [R, T, Hq] f32; 0 and -inf where nothing is stored. Sync: none.
    """
    stored = stored_entries(store, rows, before, own_visible)
    args = (store.pages, store.fmt, stored.block_table, stored.seqlens)
    options = {"scale": scale, "window": window}
    if stored.tail is not None:
        options |= {"tail": stored.tail, "tail_rows": stored.tail_rows}
    q, num_queries = q.contiguous(), q.shape[1]
    if num_queries == 1:
        out, lse, _ = ops.decode(
            q.squeeze(1), *args, q_positions=None if window is None else q_positions.reshape(-1).contiguous(), **options
        )
        return out.unsqueeze(1), lse.unsqueeze(1)
    if num_queries < (DENSE_FROM_RAW if store.fmt.raw else DENSE_FROM_COMPRESSED):
        return ops.prefill_cached(q, *args, q_positions.contiguous(), **options)
    return ops.paged_attention(q, *args, q_positions=q_positions, **options)

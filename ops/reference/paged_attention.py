"""Attention of many queries per request to its pages: gather, decode once, one dense attention. R requests, S tables each, L slots."""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds.ops.format.formats import PageFormat

from .formats import decode_pages, positions, views
from .sdpa_lse import sdpa_lse

_PIECE = 32 << 20  # bytes
_WHOLE_ON = ("cpu",)  # device types


def paged_attention(
    q: Tensor,
    pages: Tensor,
    fmt: PageFormat,
    block_table: Tensor,
    seqlens: Tensor,
    *,
    scale: float,
    window: int | None = None,
    q_positions: Tensor | None = None,
    tail: Tensor | None = None,
    tail_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What `prefill_cached` without causality computes, for queries so many that decoding the pages into dense K and V costs less.

    Args: as in prefill_cached: q [R, T, Hq, Dk], block_table [R * S, 1, C] int32, seqlens [R * S, 1] int32, q_positions [R, T] (needed with
        a window), tail [rows, Hkv, group, Dk], tail_rows [R * S].

    Returns:
        out [R, T, Hq, Dv] f32, lse [R, T, Hq] f32 (natural log); 0 and -inf where a row has no visible entry.
        Slots beyond seqlens are never used: they may hold NaN.

    Sync: none. Cost: copies the R * S * C pages of the tables once, as dense K and V; plain torch on every device. On a device 32 MiB of
    them at a time, each piece merged into the ones before.
    """
    step = _columns_at_a_time(q, fmt, block_table)
    options = {"scale": scale, "window": window, "q_positions": q_positions, "tail": tail, "tail_rows": tail_rows}
    if step >= block_table.shape[2]:
        return _attend(q, pages, fmt, block_table, seqlens, **options)
    found = None
    for first in range(0, block_table.shape[2], step):
        part = block_table[:, :, first : first + step]
        # What lies before the piece or behind it is of no length in it; a group that is open is open in one piece only.
        inside = (seqlens - first * fmt.page_size).clamp(0, part.shape[2] * fmt.page_size)
        one = _attend(q, pages, fmt, part, inside, **options)
        found = one if found is None else _added(*found, *one)
    return found


def _columns_at_a_time(q: Tensor, fmt: PageFormat, block_table: Tensor) -> int:
    """Of the tables: all on a CPU; on a device as many as make dense keys and values of _PIECE bytes in f32."""
    N, _, C = block_table.shape
    per_column = N * fmt.page_size * fmt.num_kv_heads * (fmt.k_dim + (0 if fmt.latent else fmt.v_dim)) * 4
    return C if q.device.type in _WHOLE_ON else max(1, _PIECE // per_column)


def _added(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two partial results as one, in the memory of the first: merge_partials would stack them."""
    top = torch.maximum(lse, other_lse).clamp_min(torch.finfo(lse.dtype).min)
    weights = [torch.exp(x - top) for x in (lse, other_lse)]
    total = weights[0] + weights[1]
    shares = [(w / total.clamp_min(torch.finfo(lse.dtype).tiny)).unsqueeze(-1) for w in weights]
    return out.mul_(shares[0]).addcmul_(other, shares[1]), top + total.log()


def _attend(q, pages, fmt, block_table, seqlens, *, scale, window, q_positions, tail, tail_rows) -> tuple[Tensor, Tensor]:
    R, N, C = q.shape[0], block_table.shape[0], block_table.shape[2]
    ids = block_table.clamp_min(0).flatten()
    token = torch.arange(C * fmt.page_size, device=q.device)
    valid = token < seqlens  # [N, C * page_size]
    k, v = _dense(pages, fmt, ids, q.dtype)
    k = k.view(N, -1, *k.shape[2:])
    if fmt.grouped:
        _put_tail(k, fmt, seqlens, tail, tail_rows)
    k = k.view(R, -1, *k.shape[2:])  # [R, L, Hkv, Dk]
    v = k[..., : fmt.v_dim] if fmt.latent else v.view(R, -1, *v.shape[2:])
    valid = valid.view(R, -1)
    # A weight of 0 times NaN would still be NaN: what is hidden must also be finite.
    hidden = ~valid[:, :, None, None]
    k.masked_fill_(hidden, 0)
    if not fmt.latent:
        v.masked_fill_(hidden, 0)
    mask = valid[:, None, None, :]
    if window is not None:
        key_positions = positions(pages, fmt).index_select(0, ids).view(R, 1, 1, -1)
        mask = mask & (key_positions > q_positions[:, None, :, None] - window)
    out, lse = sdpa_lse(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale, mask=mask)
    return out.transpose(1, 2), lse.transpose(1, 2)


def _dense(pages: Tensor, fmt: PageFormat, ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """k [n, page_size, Hkv, Dk] and v (latent: None) of the pages `ids` [n]; raw formats in the dtype of q, the others in f32."""
    if fmt.raw:
        k, v, _ = views(pages, fmt)
        k, v = (x.transpose(1, 2).index_select(0, ids).to(dtype) for x in (k, v if not fmt.latent else k[..., :0]))
        return k, v
    k, v = decode_pages(pages.index_select(0, ids), fmt)
    return k.transpose(1, 2).contiguous(), None if fmt.latent else v.transpose(1, 2).contiguous()


def _put_tail(k: Tensor, fmt: PageFormat, seqlens: Tensor, tail: Tensor, tail_rows: Tensor) -> None:
    """The raw keys of the open group of each table, in place of codes that are not there yet. k [N, L, Hkv, Dk]."""
    if k.shape[1] == 0:
        return
    open_at = seqlens - seqlens % fmt.group  # [N, 1]
    # A table without an open group may end at L: its slots are moved back and none is written.
    slot = open_at.clamp_max(k.shape[1] - fmt.group) + torch.arange(fmt.group, device=k.device)
    index = slot[:, :, None, None].expand(-1, -1, *k.shape[2:]).to(torch.int64)
    raw = tail.index_select(0, tail_rows).transpose(1, 2).to(k.dtype)  # [N, group, Hkv, Dk]
    in_tail = ((slot >= open_at) & (slot < seqlens))[:, :, None, None]
    k.scatter_(1, index, torch.where(in_tail, raw, k.gather(1, index)))

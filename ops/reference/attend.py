"""Attention to paged records, torch reference. N block tables, R requests of T queries, H kv heads, C table columns, P tokens of a page."""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds.ops.format.formats import PageFormat

from .formats import decode_pages, positions
from .merge_partials import merge_partials


def attend(
    q: Tensor,
    pages: Tensor,
    fmt: PageFormat,
    block_table: Tensor,
    seqlens: Tensor,
    *,
    scale: float,
    window: int = 0,
    causal: bool = False,
    q_positions: Tensor | None = None,
    page_list: Tensor | None = None,
    tail: Tensor | None = None,
    tail_rows: Tensor | None = None,
    with_page_lse: bool = False,
    block_size: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """q [R, T, Hq, Dk] against the entries of N = R * S tables; the other arguments as in ops/decode.py and ops/prefill_cached.py.

    Computed in f32, or in f64 when q is f64. Returns out [R, T, Hq, Dv], lse [R, T, Hq], page_lse [N, T, Hq, C] or None.

    Sync: yes (only the pages in use are decoded); not graph safe.
    """
    R, T, Hq, _ = q.shape
    N, num_kv_heads = block_table.shape[0], max(block_table.shape[1], fmt.num_kv_heads)
    group = Hq // num_kv_heads
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    k, v, stored, valid = _gather(
        pages, fmt, block_table, seqlens, num_kv_heads, page_list, tail, tail_rows, dtype, block_size or fmt.page_size
    )
    C = valid.shape[2]
    q = q.to(dtype).view(R, T, num_kv_heads, group, -1).repeat_interleave(N // R, 0)
    scores = torch.einsum("nthgd,nhcpd->nthgcp", q * scale, k)
    mask = valid[:, None, :, None]  # [N, T, H, G, C, P]
    if window or causal:
        asked = q_positions.repeat_interleave(N // R, 0).view(N, T, 1, 1, 1, 1)
        stored = stored[:, None, :, None]
        mask = mask & (stored <= asked if causal else True) & (stored > asked - window if window else True)
    scores = scores.masked_fill(~mask, -torch.inf)
    page_lse = scores.logsumexp(-1).view(N, T, Hq, C) if with_page_lse else None
    scores = scores.flatten(-2)
    lse = scores.logsumexp(-1) if scores.shape[-1] else scores.new_full(scores.shape[:-1], -torch.inf)
    weights = torch.exp(scores - lse.unsqueeze(-1).clamp_min(torch.finfo(dtype).min))
    out = torch.einsum("nthgl,nhld->nthgd", weights, v.flatten(2, 3))
    out, lse = out.reshape(R, N // R, T, Hq, -1).transpose(0, 1), lse.reshape(R, N // R, T, Hq).transpose(0, 1)
    return *merge_partials(out, lse), page_lse


def _gather(pages, fmt, block_table, seqlens, num_kv_heads, page_list, tail, tail_rows, dtype, block_size):
    """k [N, H, C, P, Dk], v [N, H, C, P, Dv], stored positions and validity [N, H, C, P]; zeros where not valid, whatever is stored.

    C: what is listed, or all. Of a page only the listed block is valid.
    """
    N, _, max_pages = block_table.shape
    blocks, slot = fmt.page_size // block_size, torch.arange(fmt.page_size, device=pages.device)
    named = torch.arange(max_pages * blocks, device=pages.device).expand(N, 1, -1) if page_list is None else page_list.long()
    ordinals = torch.where(named >= 0, named // blocks, -1)
    wide = lambda x: x.expand(N, num_kv_heads, x.shape[-1])  # noqa: E731
    ordinals, named = wide(ordinals), wide(named)
    ids = wide(block_table).long().gather(2, ordinals.clamp_min(0)) if ordinals.numel() else ordinals
    lens = wide(seqlens.long().unsqueeze(-1)).unsqueeze(-1)  # [N, H, 1, 1]
    token = ordinals.unsqueeze(-1) * fmt.page_size + slot
    valid = (ordinals >= 0).unsqueeze(-1) & (token < lens) & (slot // block_size == (named % blocks).unsqueeze(-1))
    # Only what is valid is looked up: tables may hold anything beyond seqlens.
    used, index = torch.unique(torch.where(valid.any(-1), ids, 0), return_inverse=True)
    taken = pages.index_select(0, used) if pages.shape[0] else pages.new_zeros(1, fmt.record_bytes)
    head = torch.arange(num_kv_heads, device=pages.device).view(1, -1, 1) % fmt.num_kv_heads
    decoded_k, decoded_v = decode_pages(taken, fmt)
    k, v = decoded_k[index, head].to(dtype), decoded_v[index, head].to(dtype)
    if tail is not None:
        in_tail = (token >= lens - lens % fmt.group) & valid
        rows = wide(tail_rows.view(N, -1, 1)).long().clamp_min(0)
        raw = tail[rows.unsqueeze(-1), head.unsqueeze(-1), token.remainder(fmt.group)].to(dtype)
        k = torch.where(in_tail.unsqueeze(-1), raw, k)
        if fmt.latent:
            v = k[..., : fmt.v_dim]
    hidden = ~valid.unsqueeze(-1)
    return k.masked_fill(hidden, 0), v.masked_fill(hidden, 0), positions(taken, fmt)[index], valid

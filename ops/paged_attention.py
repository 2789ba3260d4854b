"""Attention over paged entries, torch reference. Shapes: R request rows, S local shards, T queries per row, H heads, D head_dim."""

import torch
from torch import Tensor

from .sdpa_lse import sdpa_lse


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    positions: Tensor,
    block_table: Tensor,
    seqlens: Tensor,
    *,
    scale: float,
    window: int | None = None,
    q_positions: Tensor | None = None,
    length: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend from R rows of T queries to the entries their block tables name.

    Args:
        q: [R, T, Hq, Dk].
        k_pages: [num_pages, page_size, Hkv, Dk].
        v_pages: [num_pages, page_size, Hkv, Dv]; may be a view of k_pages (MLA: the first columns of the latent).
        positions: [num_pages, page_size] int32, the stored position of each slot.
        block_table: [R, S, max_pages] integer page ids, -1 empty.
        seqlens: [R, S] int, entries of each row in each local shard, counted from the start of its table.
        scale: softmax scale.
        window: keys must have position > query position - window; None = no window.
        q_positions: [R, T] int, needed with a window. Causality is the caller's: pass seqlens that end before the queries' own chunk
            (or T == 1 and include the query's own entry).
        length: seqlens of every row when S == 1 and the caller knows on the host that they are all equal: no slot needs hiding then.

    Returns:
        out [R, T, Hq, Dv] f32, lse [R, T, Hq] f32 (natural log); 0 and -inf where a row has no visible entry.
        Slots beyond seqlens are never used: they may hold NaN.

    Sync: none. Cost: reads R*S*max_pages whole pages.
    """
    R, _, max_pages = block_table.shape
    page_size = k_pages.shape[1]
    pages = block_table.clamp_min(0).view(-1)
    shared = v_pages.data_ptr() == k_pages.data_ptr()
    k = k_pages.index_select(0, pages).view(R, -1, *k_pages.shape[2:])  # [R, L, Hkv, Dk]
    v = k[..., : v_pages.shape[-1]] if shared else v_pages.index_select(0, pages).view(R, -1, *v_pages.shape[2:])
    q = q.transpose(1, 2)
    if length is not None and window is None:
        out, lse = sdpa_lse(q, k[:, :length].transpose(1, 2), v[:, :length].transpose(1, 2), scale=scale)
        return out.transpose(1, 2), lse.transpose(1, 2)
    slot = torch.arange(max_pages * page_size, device=q.device)
    valid = (slot < seqlens.unsqueeze(-1)).view(R, -1)  # [R, L]
    # A weight of 0 times NaN would still be NaN: what is hidden must also be finite.
    hidden = ~valid[:, :, None, None]
    k.masked_fill_(hidden, 0)
    if not shared:
        v.masked_fill_(hidden, 0)
    mask = valid[:, None, None, :]
    if window is not None:
        key_positions = positions.index_select(0, pages).view(R, 1, 1, -1)
        mask = mask & (key_positions > q_positions[:, None, :, None] - window)
    out, lse = sdpa_lse(q, k.transpose(1, 2), v.transpose(1, 2), scale=scale, mask=mask)
    return out.transpose(1, 2), lse.transpose(1, 2)


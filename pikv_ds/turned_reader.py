"""Attention to pages that hold coefficients of un-rotated keys: decode, rotate by the stored positions, attend. Plain torch.

Between the up-projection and the query stands a rotation that differs from entry to entry, so U can't be folded into q
(pikv_ds/transform.py): keys are reconstructed, all pages of a row at a time, as ops.paged_attention does for long chunks. R rows, S local
shards, N = R * S tables, L slots of each, T queries per row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds import ops

from .entries import decoded
from .reader import Before, stored_entries
from .rope import turn
from .store import LayerStore
from .transform import Transform


def read_turned(
    store: LayerStore,
    maps: Transform,
    q: Tensor,
    rows: slice,
    before: Before | None,
    own_visible: Tensor | None,
    *,
    scale: float,
    window: int | None,
    q_positions: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attention of rotated queries q [R, T, Hq, D] to the entries of the rows `rows` in all local shards.

    Args: as in reader.read_pages; maps: of the layer, with inv_freq.

    Returns: out [R, T, Hq, r] f32, coefficients of values; lse [R, T, Hq] f32, complete; 0 and -inf where nothing is stored. Sync: none.
        Cost: N * L * Hkv * (D + r) f32 numbers at a time.
    """
    stored = stored_entries(store, rows, before, own_visible)
    table, counts = stored.block_table.flatten(0, 1), stored.seqlens.flatten()  # [N, C], [N]
    tail = None if stored.tail is None else stored.tail.index_select(0, stored.tail_rows.flatten())
    held = torch.arange(table.shape[1] * store.page_size, device=q.device) < counts.unsqueeze(1)  # [N, L]
    # What is hidden must be finite: a weight of 0 times NaN would still be NaN.
    c, v = (torch.where(held[:, None, :, None], x, 0) for x in decoded(store, table, counts, tail))  # [N, Hkv, L, r]
    at = store.positions.index_select(0, table.clamp_min(0).flatten()).view(held.shape)
    k = turn(maps.k.invert(c.transpose(1, 2)), at, maps.inv_freq)  # [N, L, Hkv, D]
    k, v = (x.reshape(q.shape[0], -1, *x.shape[2:]).transpose(1, 2) for x in (k, v.transpose(1, 2)))
    mask = held.view(q.shape[0], 1, 1, -1)
    if window is not None:
        mask = mask & (at.view(mask.shape) > q_positions[:, None, :, None] - window)
    out, lse = ops.sdpa_lse(q.float().transpose(1, 2), k, v, scale=scale, mask=mask)
    return out.transpose(1, 2), lse.transpose(1, 2)

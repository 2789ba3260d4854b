"""Encode new entries into their slots, torch reference. T tokens, H kv heads, G tokens of a K scale group."""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds.ops.format.formats import PageFormat

from .codes import encode_integers, saturated_half
from .formats import positions, rope, scales, store_codes, store_rows


def append(
    pages: Tensor,
    fmt: PageFormat,
    k: Tensor,
    v: Tensor,
    token_positions: Tensor,
    slot_mapping: Tensor,
    *,
    tail: Tensor | None = None,
    tail_rows: Tensor | None = None,
) -> None:
    """The arguments are those of append.py. Sync: yes (tokens with slot -1 are dropped by a mask)."""
    here = slot_mapping >= 0
    slot = slot_mapping[here].long()
    page, offset = slot // fmt.page_size, slot % fmt.page_size
    positions(pages, fmt)[page, offset] = token_positions[here].to(torch.int32)
    if not fmt.latent:
        store_rows(pages, fmt, "v", _rows(page, offset, fmt), v[here])
    if fmt.rope_raw:
        rope(pages, fmt)[_rows(page, offset, fmt)] = saturated_half(k[here][..., fmt.k_coded :])
    if not fmt.grouped:
        store_rows(pages, fmt, "k", _rows(page, offset, fmt), k[here][..., : fmt.k_coded])
        return
    _append_grouped(pages, fmt, k[here], slot, tail, tail_rows[here].long())


def _append_grouped(pages: Tensor, fmt: PageFormat, k: Tensor, slot: Tensor, tail: Tensor, rows: Tensor) -> None:
    """Groups that become full are encoded from the tail's older tokens and this call's; the newest group of each row stays in the tail."""
    k = saturated_half(k) if tail.dtype == torch.float16 else k.to(tail.dtype)
    token_at = {}
    for index, s in enumerate(slot.tolist()):
        token_at[s] = index
    for index, s in enumerate(slot.tolist()):
        if s % fmt.group != fmt.group - 1:
            continue
        first = s - fmt.group + 1
        members = tail[rows[index]].clone()  # [H, G, Dk]
        for step in range(fmt.group):
            if first + step in token_at:
                members[:, step] = k[token_at[first + step]]
        code, scale, zero = encode_integers(members[..., : fmt.k_coded], fmt.traits.levels, dim=-2)
        page, offset = divmod(first, fmt.page_size)
        span = slice(offset, offset + fmt.group)
        store_codes(pages, fmt, "k", (page, slice(None), span), code)
        scales(pages, fmt, "k_scale")[page, :, offset // fmt.group] = scale.squeeze(-2)
        scales(pages, fmt, "k_zero")[page, :, offset // fmt.group] = zero.squeeze(-2)
    for index, s in enumerate(slot.tolist()):  # in order: a later group of a row overwrites an earlier one
        tail[rows[index], :, s % fmt.group] = k[index]


def _rows(page: Tensor, offset: Tensor, fmt: PageFormat) -> tuple[Tensor, Tensor, Tensor]:
    heads = torch.arange(fmt.num_kv_heads, device=page.device)
    return page.unsqueeze(-1), heads, offset.unsqueeze(-1)

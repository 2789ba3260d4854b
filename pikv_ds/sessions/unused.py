"""Bytes of page records that no entry has: what lies there is left over from other requests, and is no part of a copy. Pure."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from pikv_ds.ops import PageFormat


def cleared(records: Tensor, used: Tensor, fmt: PageFormat) -> Tensor:
    """Records [n, record_bytes] uint8 whose pages hold entries in their first used [n] slots, 0 in every byte that these do not need.

    A group of keys that is not full is in the raw tail, so its codes and scales are not needed either. Sync: none.
    """
    return torch.where(_needed_from(fmt).to(records.device) < used.unsqueeze(1), records, 0)


@lru_cache(maxsize=64)
def _needed_from(fmt: PageFormat) -> Tensor:
    """[record_bytes] int16: the slot that must be used for a byte to mean something; page_size = padding."""
    size, head = fmt.page_size, fmt.head
    needed = torch.full((fmt.record_bytes,), size, dtype=torch.int16)
    slot = torch.arange(size, dtype=torch.int16)
    group_end = slot // fmt.group * fmt.group + fmt.group - 1 if fmt.grouped else slot
    per_slot = {"k": (head.k, group_end), "v": (head.v, slot), "v_scale": (head.v_scale, slot), "v_zero": (head.v_zero, slot)}
    per_slot["rope"] = (head.rope, slot)
    keys = group_end[fmt.group - 1 :: fmt.group] if fmt.grouped else slot
    per_slot |= {"k_scale": (head.k_scale, keys), "k_zero": (head.k_zero, keys)}
    widths = _row_bytes(fmt)
    for of_head in range(fmt.num_kv_heads):
        for name, (start, rows) in per_slot.items():
            if start >= 0:
                at = of_head * head.end + start
                needed[at : at + len(rows) * widths[name]] = rows.repeat_interleave(widths[name])
    needed[fmt.positions_offset : fmt.positions_offset + 4 * size] = slot.repeat_interleave(4)
    return needed


def _row_bytes(fmt: PageFormat) -> dict[str, int]:
    """Bytes of a block per slot, of key scales of a grouped format per group."""
    fp4 = lambda dim: -(-dim // 16)  # noqa: E731
    k_scale, k_zero = {True: (2 * fmt.k_coded,) * 2, False: (fp4(fmt.k_coded), 1) if fmt.name.startswith("fp4") else (2, 0)}[fmt.grouped]
    v_scale, v_zero = (fp4(fmt.v_dim), 1) if fmt.v_name.startswith("fp4") else (2, 2)
    return {
        "k": fmt.k_row_bytes, "v": fmt.v_row_bytes, "k_scale": k_scale, "k_zero": k_zero, "v_scale": v_scale, "v_zero": v_zero,
        "rope": 2 * (fmt.k_dim - fmt.v_dim),
    }  # fmt: skip

"""Smallest and largest key of each page of un-rotated keys, as queries meet them. Plain torch.

N tokens, H kv heads, D width of a key as queries meet it, P entries of a page.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from pikv_ds.ops.format.bound_codes import encode_box, not_above

from .pool import PagePool
from .view import PageView


class Keys(Protocol):
    """Entries of pages as queries meet them: k [N, H, K, P, D] f32, held [N, 1, K, P] bool."""

    k: Tensor
    held: Tensor


def page_boxes(bounds: Tensor, pool: PagePool, rebuild: Callable[[PageView], Keys], slot_mapping: Tensor, table: Tensor) -> None:
    """ops.page_bounds of the entries in slot_mapping [N] int32 (-1 = none here) of tables [N] int32, in place.

    The box of a page is made anew from all of its keys up to the newest in slot_mapping, as they are read. Sync: none. Cost: reads the
    pages that slot_mapping names, once.
    """
    num_tokens, page_size = slot_mapping.numel(), pool.page_size
    if not num_tokens or not pool.num_pages:
        return
    # A table of n tokens touches n / P + 2 pages at most; one place more is for tokens that are not here.
    places = min(num_tokens, num_tokens // page_size + 2 * pool.table.counts.numel() + 1) + 1
    here, slot = slot_mapping >= 0, slot_mapping.to(torch.int64)
    page, order = torch.where(here, slot // page_size, pool.num_pages).sort()
    place = torch.cat([page.new_zeros(1), (page.diff() > 0).cumsum(0)])
    ids = page.new_full((places,), pool.num_pages).scatter_(0, place, page)
    entries = page.new_zeros(places).scatter_reduce_(0, place, torch.where(here, slot % page_size + 1, 0)[order], "amax")
    rows = page.new_zeros(places).scatter_reduce_(0, place, table.to(torch.int64)[order], "amax")
    real, last = ids < pool.num_pages, pool.num_pages - 1
    tail_rows = None if pool.tail is None else rows
    read = rebuild(PageView(ids.clamp_max(last).view(-1, 1, 1), torch.where(real, entries, 0).view(-1, 1), pool.tail, tail_rows))
    absent = ~read.held.unsqueeze(-1) | read.k.isnan()  # [places, H, 1, P, D]
    low, high = read.k.masked_fill(absent, torch.inf).amin((2, 3)), read.k.masked_fill(absent, -torch.inf).amax((2, 3))
    if bounds.dtype == torch.int8:
        box = encode_box(torch.stack((low, high), 2))
    else:
        box = torch.stack((not_above(low, bounds.dtype), -not_above(-high, bounds.dtype)), 2)
    # Places without a page repeat the first; when that is none either, a page gets the bounds that it has.
    source = torch.where(real, torch.arange(places, device=page.device), 0)
    target = ids[source].clamp_max(last)
    bounds[target] = torch.where(real[0], box[source], bounds[target])

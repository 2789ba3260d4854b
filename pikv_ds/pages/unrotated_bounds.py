"""Smallest and largest key of each page, of whatever a store holds: pages of un-rotated keys are bounded as queries meet them, in torch.

N tokens, H kv heads, D width of a key as queries meet it, P entries of a page.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds import ops
from pikv_ds.ops.format.bound_codes import encode_box, not_above

from .pool import LayerStore
from .unrotated import rebuild
from .view import Stored


def bounds_shape(store: LayerStore, dtype: torch.dtype) -> tuple[int, int, int]:
    """Shape of the bounds of one page, ops.bounds_shape for the width of a key as queries meet it."""
    return ops.bounds_shape(store.fmt, dtype, store.k_dim)


def page_bounds(bounds: Tensor, store: LayerStore, slot_mapping: Tensor, table: Tensor) -> None:
    """ops.page_bounds of the entries in slot_mapping [N] int32 (-1 = none here) of tables [N] int32, in place.

    Of un-rotated keys the box of a page is made anew from all of its keys up to the newest in slot_mapping, as they are read: put together
    and turned to their positions. Sync: none. Cost: reads the pages that slot_mapping names, once.
    """
    if store.turned is None:
        options = {} if store.tail is None else {"tail": store.tail, "tail_rows": table}
        ops.page_bounds(bounds, store.pages, store.fmt, slot_mapping, **options)
        return
    num_tokens, page_size = slot_mapping.numel(), store.page_size
    if not num_tokens or not store.num_pages:
        return
    # A table of n tokens touches n / P + 2 pages at most; one place more is for tokens that are not here.
    places = min(num_tokens, num_tokens // page_size + 2 * store.counts.numel() + 1) + 1
    here, slot = slot_mapping >= 0, slot_mapping.to(torch.int64)
    page, order = torch.where(here, slot // page_size, store.num_pages).sort()
    place = torch.cat([page.new_zeros(1), (page.diff() > 0).cumsum(0)])
    ids = page.new_full((places,), store.num_pages).scatter_(0, place, page)
    entries = page.new_zeros(places).scatter_reduce_(0, place, torch.where(here, slot % page_size + 1, 0)[order], "amax")
    rows = page.new_zeros(places).scatter_reduce_(0, place, table.to(torch.int64)[order], "amax")
    real, last = ids < store.num_pages, store.num_pages - 1
    tail_rows = None if store.tail is None else rows
    read = rebuild(store, Stored(ids.clamp_max(last).view(-1, 1, 1), torch.where(real, entries, 0).view(-1, 1), store.tail, tail_rows))
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

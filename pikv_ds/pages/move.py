"""Full pages of the near pool move to the far pool of their layer: encoded there, freed here. Host phase, between forwards.

R request rows, S local shards, C columns of a block table, P entries of a page.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pikv_ds import ops
from pikv_ds.codecs.request_maps import PageMaps
from pikv_ds.codecs.rope import turn

from .pool import LayerStore
from .recycle import drop

PAGES_AT_ONCE = 64  # decoded to f32 at a time: bounds what demoting a long prompt takes


class Moved(NamedTuple):
    """n pages that moved, each once however many tables name it. rows, shards [n] int64: of one of these (local shard)."""

    source: Tensor
    """[n] int64 page ids in the near pool, which are free now."""
    target: Tensor
    """[n] int64 page ids in the far pool."""
    rows: Tensor
    shards: Tensor


def demote(near: LayerStore, far: LayerStore, gone: Tensor, maps: PageMaps | None = None) -> Moved | None:
    """Encode the pages `gone` names into pages of the far pool, at the ends of the same tables, and free them in the near pool.

    Args: gone [R, S, C] bool, full pages of near's block table. A page that beams share moves once; the tables outside `gone` that name it
        keep it. maps: what far pages hold are coefficients.
    Returns: None when nothing moved.
    """
    row, shard, column = torch.nonzero(gone, as_tuple=True)
    if row.numel() == 0:
        return None
    page_size, device = near.page_size, near.device
    source, index, uses = torch.unique(near.block_table[row, shard, column].to(torch.int64), return_inverse=True, return_counts=True)
    count, begin, moved = source.numel(), far.counts // page_size, gone.sum(-1)
    far.reserve(int(far.free_top), count, int((begin + moved).max()))
    far.free_top -= count
    top = int(far.free_top)
    target = far.free_stack[top : top + count].clone()
    far.refcount[target.long()] = uses.to(torch.int32)
    at = begin[row, shard] + (gone.cumsum(-1) - 1)[row, shard, column]
    far.block_table[row, shard, at] = target[index]
    far.counts += moved.to(torch.int32) * page_size
    first = torch.full((count,), row.numel(), device=device).scatter_reduce_(0, index, torch.arange(row.numel(), device=device), "amin")
    _encode(near, far, source, target, maps, row[first])
    for name, values in near.summaries.items():
        if name in far.summaries:
            far.summaries[name][target.long()] = values[source]
    drop(near, gone)
    return Moved(source, target.long(), row[first], shard[first])


def _encode(near: LayerStore, far: LayerStore, source: Tensor, target: Tensor, maps: PageMaps | None, rows: Tensor) -> None:
    if near.fmt == far.fmt and maps is None:
        ops.migrate(far.pages, near.pages, target, source.to(torch.int32))
        return
    for begin in range(0, source.numel(), PAGES_AT_ONCE):
        ids, slots = source[begin : begin + PAGES_AT_ONCE], page_slots(target[begin : begin + PAGES_AT_ONCE], far.page_size)
        (k, v), positions = entries_of(near, ids), near.positions.index_select(0, ids).flatten()
        if maps is not None:
            k = k if far.turned is None else turn(k, positions, far.turned.inv_freq, back=True)
            k, v = (x.contiguous() for x in maps.encode_pages(k, v, rows[begin : begin + PAGES_AT_ONCE]))
        options = {}
        if far.fmt.grouped:  # a page is whole groups: its tail is filled and used up within the call
            shape = (ids.numel(), far.fmt.num_kv_heads, far.fmt.group, far.fmt.k_dim)
            options["tail"] = torch.zeros(shape, dtype=far.tail.dtype, device=near.device)
            options["tail_rows"] = torch.arange(ids.numel(), dtype=torch.int32, device=near.device).repeat_interleave(far.page_size)
        ops.append(far.pages, far.fmt, k, v, positions, slots, **options)


def entries_of(store: LayerStore, pages: Tensor) -> tuple[Tensor, Tensor]:
    """k [n * P, Hkv, Dk] and v [n * P, Hkv, Dv] f32 of whole pages [n], in slot order."""
    k, v = ops.decode_pages(store.pages.index_select(0, pages), store.fmt)
    return tuple(x.transpose(1, 2).flatten(0, 1).contiguous() for x in (k, v))


def page_slots(pages: Tensor, page_size: int) -> Tensor:
    """[n * P] int32, every slot of the pages [n]."""
    offset = torch.arange(page_size, device=pages.device)
    return (pages.unsqueeze(-1) * page_size + offset).flatten().to(torch.int32)

"""Full pages of one pool move to the next of their layer: encoded there, freed here. Host phase, between forwards.

R request rows, S tables of a row, C columns of a table, P entries of a page.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pikv_ds import ops

from .pool import PagePool
from .recycle import drop

PAGES_AT_ONCE = 64  # decoded to f32 at a time: bounds what demoting a long prompt takes


class Moved(NamedTuple):
    """n pages that moved, each once however many tables name it. rows, tables [n] int64: one of these, of its row."""

    source: Tensor
    """[n] int64 page ids in the pool that they left, which are free now."""
    target: Tensor
    """[n] int64 page ids in the pool where they are."""
    rows: Tensor
    tables: Tensor


def demote(near: PagePool, far: PagePool, gone: Tensor) -> Moved | None:
    """Encode the pages `gone` names into pages of the far pool, at the ends of the same tables, and free them in the near pool.

    Args: gone [R, S, C] bool, full pages of near's tables. A page that beams share moves once; the tables outside `gone` that name it keep
        it. Summaries that both pools keep move along, and counters.
    Returns: None when nothing moved.
    """
    row, at, column = torch.nonzero(gone, as_tuple=True)
    if row.numel() == 0:
        return None
    source, index, uses = torch.unique(near.table.ids[row, at, column].to(torch.int64), return_inverse=True, return_counts=True)
    count, begin, moved = source.numel(), far.table.counts // near.page_size, gone.sum(-1)
    far.table.widen(int((begin + moved).max()))
    target = far.take(count, uses)
    place = begin[row, at] + (gone.cumsum(-1) - 1)[row, at, column]
    far.table.ids[row, at, place] = target[index]
    far.table.counts += moved.to(torch.int32) * near.page_size
    order = torch.arange(row.numel(), device=near.device)
    first = torch.full((count,), row.numel(), device=near.device).scatter_reduce_(0, index, order, "amin")
    _encode(near, far, source, target, row[first])
    for name, values in near.summaries.items():
        if name in far.summaries:
            far.summaries[name][target.long()] = values[source]
    for name, values in near.table.counted.items():  # of a page that rows share, each takes its own along
        far.table.counted[name][row, at, place] = values[row, at, column]
    drop(near, gone)
    return Moved(source, target.long(), row[first], at[first])


def _encode(near: PagePool, far: PagePool, source: Tensor, target: Tensor, rows: Tensor) -> None:
    maps = None if far.maps is near.maps else far.maps
    if near.fmt == far.fmt and maps is None:
        ops.migrate(far.pages, near.pages, target, source.to(torch.int32))
        return
    for begin in range(0, source.numel(), PAGES_AT_ONCE):
        ids, slots = source[begin : begin + PAGES_AT_ONCE], page_slots(target[begin : begin + PAGES_AT_ONCE], far.page_size)
        (k, v), positions = entries_of(near, ids), near.positions.index_select(0, ids).flatten()
        if maps is not None:
            k, v = (x.contiguous() for x in maps.encode_pages(k, v, positions, rows[begin : begin + PAGES_AT_ONCE]))
        options = {}
        if far.fmt.grouped:  # a page is whole groups: its tail is filled and used up within the call
            shape = (ids.numel(), far.fmt.num_kv_heads, far.fmt.group, far.fmt.k_dim)
            options["tail"] = torch.zeros(shape, dtype=far.tail.dtype, device=near.device)
            options["tail_rows"] = torch.arange(ids.numel(), dtype=torch.int32, device=near.device).repeat_interleave(far.page_size)
        ops.append(far.pages, far.fmt, k, v, positions, slots, **options)


def entries_of(pool: PagePool, pages: Tensor) -> tuple[Tensor, Tensor]:
    """k [n * P, Hkv, Dk] and v [n * P, Hkv, Dv] f32 of whole pages [n], in slot order, as the pool holds them."""
    k, v = ops.decode_pages(pool.pages.index_select(0, pages), pool.fmt)
    return tuple(x.transpose(1, 2).flatten(0, 1).contiguous() for x in (k, v))


def page_slots(pages: Tensor, page_size: int) -> Tensor:
    """[n * P] int32, every slot of the pages [n]."""
    offset = torch.arange(page_size, device=pages.device)
    return (pages.unsqueeze(-1) * page_size + offset).flatten().to(torch.int32)

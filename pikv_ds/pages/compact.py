"""Entries leave from inside pages: those that stay of a table move up, and the pages behind them are freed. Host phase.

R request rows, S tables of a row (local shards; with budgets per head shard * heads + head), C columns, L = C * page_size slots of a table.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from pikv_ds import ops
from pikv_ds.ops import PageFormat

from .entries import keys_at
from .pool import LayerStore
from .recycle import clear_unfilled


class Compacted(NamedTuple):
    """What compact() did. The entries of all pages that changed, those that did not move included: n of them."""

    dropped: int
    """Entries that went, counted once per table."""
    table: Tensor
    """[n] int64, row * S + table, ascending."""
    index: Tensor
    """[n] int64, the place of the entry in its table."""


def compact(store: LayerStore, gone: Tensor) -> Compacted:
    """Take entries out of their tables; the others close up in their order, in the same bytes.

    Pages before the first entry that goes stay as they are, shared or not. A page that changes and that another table names too is
    copied first. Formats that encode keys by groups of tokens encode those of changed groups anew, from what they decode to.

    Args: gone [R, S, L] bool, entries to take out. Sync: reads sizes back.
    """
    total = int(gone.sum())
    if total == 0:
        return Compacted(0, *torch.zeros(2, 0, dtype=torch.int64, device=gone.device))
    page_size, unit = store.page_size, store.fmt.group if store.fmt.grouped else 1
    table, counts, gone = store.block_table.flatten(0, 1), store.counts.reshape(-1), gone.flatten(0, 1)
    slot, column = (torch.arange(n, device=gone.device) for n in (gone.shape[-1], table.shape[-1]))
    stays = (slot < counts.unsqueeze(-1)) & ~gone
    left, touched = stays.sum(-1), gone.any(-1)
    start = torch.where(touched, gone.to(torch.int8).argmax(-1) // unit * unit, gone.shape[-1]).unsqueeze(-1)  # first slot that changes
    order = (~stays).to(torch.int8).argsort(dim=-1, stable=True)
    cell, place = torch.nonzero((slot >= start) & (slot < left.unsqueeze(-1)), as_tuple=True)
    index = order[cell, place]
    slots = lambda at: table[cell, at // page_size].to(torch.int64) * page_size + at % page_size  # noqa: E731
    source, bits = slots(index), token_bytes(store.fmt)
    page, offset = source // page_size, source % page_size
    moved = [block[page, offset] for block in _blocks(store.pages, store.fmt, bits)]
    values = {name: x[page, offset] for name, x in store.summaries.items() if name in store.by_entry}
    keys = keys_at(store, cell, index) if store.fmt.grouped else None

    stay = -(-left.unsqueeze(-1) // page_size)  # pages of each table that stay
    written = touched.unsqueeze(-1) & (column >= start // page_size) & (column < stay)
    leaves = touched.unsqueeze(-1) & (column >= stay) & (table >= 0)
    copied = written & (store.refcount[table.clamp_min(0)] > 1)
    _replace_pages(store, table, copied, leaves)
    store.block_table, store.counts[:] = table.view_as(store.block_table), left.view_as(store.counts)

    target = slots(place)
    page, offset = target // page_size, target % page_size
    for name, x in values.items():
        store.summaries[name][page, offset] = x
    if keys is not None:
        _encode(store, cell, target, keys)
    for block, x in zip(_blocks(store.pages, store.fmt, bits), moved, strict=True):
        block[page, offset] = x
    clear_unfilled(store)
    return Compacted(total, *torch.nonzero((slot >= start // page_size * page_size) & (slot < left.unsqueeze(-1)), as_tuple=True))


def _replace_pages(store: LayerStore, table: Tensor, copied: Tensor, leaves: Tensor) -> None:
    """Give the tables pages of their own where `copied`, with the same content, and take out those where `leaves`. Both [R * S, C]."""
    shared = table[copied].to(torch.int64)
    records, summaries = store.pages[shared], {name: x[shared] for name, x in store.summaries.items()}
    released = table[copied | leaves]
    store.refcount.index_add_(0, released, torch.full_like(released, -1))
    table[leaves] = -1
    store.rebuild_free_stack()
    if not shared.numel():
        return
    store.reserve(int(store.free_top), shared.numel(), 0)
    store.free_top -= shared.numel()
    own = store.free_stack[int(store.free_top) : int(store.free_top) + shared.numel()].clone()
    ops.migrate(store.pages, records, own, torch.arange(shared.numel(), dtype=torch.int32, device=own.device))
    for name, x in summaries.items():
        store.summaries[name][own.long()] = x
    store.refcount[own.long()] = 1
    table[copied] = own


def _encode(store: LayerStore, cell: Tensor, target: Tensor, keys: Tensor) -> None:
    """Keys by groups, and the raw tail of the open ones. Values and positions are written with them, and again by the caller."""
    values = keys.new_zeros(keys.shape[0], store.fmt.num_kv_heads, store.fmt.v_dim)
    at, tables = target.to(torch.int32), cell.to(torch.int32)
    ops.append(store.pages, store.fmt, keys.contiguous(), values, torch.zeros_like(at), at, tail=store.tail, tail_rows=tables)


def token_bytes(fmt: PageFormat) -> dict[str, int]:
    """Bytes that one entry has in each block of a head's section (ops/format/formats.py), of the blocks that have a row per entry.

    Read off a record whose blocks need no padding, so that a format that is added later is moved as well.
    """
    probe = replace(fmt, page_size=fmt.group if fmt.grouped else 16)
    starts = sorted((at, name) for name, at in probe.head._asdict().items() if at >= 0)
    by_group = ("k", "k_scale", "k_zero") if fmt.grouped else ()
    sizes = {name: (end - at) // probe.page_size for (at, name), (end, _) in zip(starts, starts[1:], strict=False)}
    return {name: size for name, size in sizes.items() if name not in by_group}


def _blocks(pages: Tensor, fmt: PageFormat, bits: dict[str, int]) -> list[Tensor]:
    """Views [P, page_size, bytes] of everything that an entry has in a record of its own."""
    where = [(h * fmt.head.end + getattr(fmt.head, name), size) for h in range(fmt.num_kv_heads) for name, size in bits.items()]
    where.append((fmt.positions_offset, 4))
    return [
        pages.as_strided((pages.shape[0], fmt.page_size, size), (pages.stride(0), size, 1), pages.storage_offset() + at)
        for at, size in where
    ]

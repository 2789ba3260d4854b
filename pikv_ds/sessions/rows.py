"""The rows of a cache as tensors that name no page, shard map or rank, and a cache that holds them. Host phase.

R rows, L layers, S shards, H heads with tables of their own (1: a page holds all), C columns of a table, n pages. Tables of one shard are
as pages/shard_copy.py copies them, so what is declared for pages, tables and rows is in a copy, and methods need not know of sessions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pikv_ds.errors import SessionError
from pikv_ds.pages.layers import RankPages
from pikv_ds.pages.pool import PagePool
from pikv_ds.pages.rows import CopiedRows
from pikv_ds.pages.shard_copy import ShardCopy, arrange, copy_in, copy_out, pages_of

from .unused import cleared

HOMES, EVICTED = "homes", "evicted"
OF_SHARD, ROW, BESIDE = "shard", "row ", "beside "


class RowsCopy(NamedTuple):
    """tensors: "shard LAYER LEVEL SHARD FIELD", "row NAME", "beside NAME", "homes" [L, R, T] int16 (several shards), "evicted"
    [L, R, S * H] int64. about: "lens" and "ints", numbers per row by name. Rows that were parked stand behind the others."""

    tensors: dict[str, Tensor]
    about: dict[str, Any]

    @property
    def lens(self) -> list[int]:
        return self.about["lens"]

    def of_shards(self) -> dict[str, Tensor]:
        """What other ranks do not have."""
        return {name: x for name, x in self.tensors.items() if name.startswith(OF_SHARD)}


def copied(pages: RankPages, lens: list[int]) -> RowsCopy:
    """Everything of this rank's shards, and what all ranks know. lens: tokens of all rows, parked ones behind the others.

    Pages come in the order of the tables that name them, and are empty where no entry is: equal rows give equal bytes whatever was stored
    before, and nothing of another request. Sync: reads sizes back.
    """
    with _with_parked(pages):
        tensors, rows = {}, pages.rows.copied()
        for layer in pages.layers:
            for level, pool in enumerate(layer.pools):
                for at, shard in enumerate(pages.map.local):
                    for name, x in _shard(pool, at).items():
                        tensors[f"{OF_SHARD} {layer.index} {level} {shard} {name}"] = x
        tensors |= {ROW + name: x for name, x in rows.tensors.items()} | {BESIDE + name: x for name, x in rows.beside.items()}
        homes, tensors[EVICTED] = pages.directory.copied(lens)
        if homes is not None:
            tensors[HOMES] = homes
    return RowsCopy(tensors, {"lens": list(lens), "ints": rows.ints})


@contextmanager
def _with_parked(pages: RankPages) -> Iterator[None]:
    """Inside, parked rows stand behind the others."""
    if not pages.parked.num_rows:
        yield
        return
    with pages.parked.shown():
        yield


def _shard(pool: PagePool, at: int) -> ShardCopy:
    """Of local shard `at`."""
    pages, index = _in_order(*pages_of(pool, at))
    copy = copy_out(pool, at, pages, index)
    size = pool.page_size
    if len(pages):
        held = copy["counts"].unsqueeze(-1) - torch.arange(index.shape[-1], device=index.device) * size  # [R, H, C]
        used = torch.zeros(len(pages) + 1, dtype=torch.int32, device=index.device)
        where = torch.where(index >= 0, index, len(pages)).flatten().long()
        used.scatter_reduce_(0, where, held.clamp(0, size).to(torch.int32).flatten(), "amax")
        copy["records"] = cleared(copy["records"], used[:-1], pool.fmt)
    if "tail" in copy:
        group = pool.fmt.group
        open_slots = (copy["counts"].flatten() % group)[:, None, None, None]
        slot = torch.arange(group, device=index.device)[None, None, :, None]
        copy["tail"] = torch.where(slot < open_slots, copy["tail"], 0)
    return copy


def _in_order(pages: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """pages [n] and index [R, H, C] of pages_of, with the pages as the tables come to them."""
    if not len(pages):
        return pages, index
    named = torch.nonzero(index.flatten() >= 0).squeeze(-1)
    which = index.flatten()[named].long()
    first = torch.full((len(pages),), index.numel(), device=index.device).scatter_reduce_(0, which, named, "amin")
    order = first.argsort()
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return pages[order], torch.where(index >= 0, place[index.clamp_min(0).long()].to(torch.int32), -1)


def check(pages: RankPages, copy: RowsCopy) -> None:
    """Raises: SessionError where tensors of a copy are not what this cache keeps for its rows. Changes nothing."""
    num_rows, heads = len(copy.lens), pages.heads
    for layer in pages.layers:
        for level, pool in enumerate(layer.pools):
            for shard in pages.map.local:
                of_shard = _of(copy, layer.index, level, shard)
                _check_shard(pool, of_shard, f"layer {layer.index}, shard {shard}", num_rows)
    shape = (len(pages.layers), num_rows, pages.num_shards * heads)
    if tuple(copy.tensors[EVICTED].shape) != shape:
        raise SessionError(f"the session has {tuple(copy.tensors[EVICTED].shape)} numbers of evicted entries, the cache {shape}")
    if set(copy.about["ints"]) != pages.rows.int_names:
        names = sorted(set(copy.about["ints"]) ^ pages.rows.int_names)
        raise SessionError(f"either the session or this cache keeps {names} of its rows, and not both: another version or method wrote it")


def _check_shard(pool: PagePool, copy: ShardCopy, where: str, num_rows: int) -> None:
    if not {"counts", "index", "records"} <= set(copy):
        raise SessionError(f"the session holds nothing of {where}; save it again")
    columns, pages, size = copy["index"].shape[-1], len(copy["records"]), pool.page_size
    tables = num_rows * pool.table.heads
    kept = {name.partition(" ")[2] for name in copy if name.startswith(("page ", "seat "))}
    own = {*pool.summaries, *pool.table.counted}
    if kept != own:
        raise SessionError(f"the session keeps {sorted(kept)} of each page of {where}, and this cache {sorted(own)}")
    wanted = {
        "counts": (num_rows, pool.table.heads), "index": (num_rows, pool.table.heads, columns), "records": (pages, pool.fmt.record_bytes),
    }  # fmt: skip
    if pool.tail is not None and not pool.full_pages:
        wanted["tail"] = (tables, *pool.tail.shape[1:])
    for name, shape in wanted.items():
        given = tuple(copy[name].shape) if name in copy else None
        if given != shape:
            raise SessionError(f"{name!r} of {where} has shape {given} in the session, this cache needs {shape}")
    if copy["index"].numel() and int(copy["index"].max()) >= pages:
        raise SessionError(f"a table of {where} names page {int(copy['index'].max())} of {pages}; save the session again")
    if copy["counts"].numel() and int(copy["counts"].max()) > columns * size:
        raise SessionError(f"a table of {where} counts more entries than its {columns} pages hold; save the session again")


def put(pages: RankPages, copy: RowsCopy) -> None:
    """The rows of a copy, after `check`, are those of the pages, which have just begun a generation of as many new rows. No collective.

    Sync: reads sizes back.
    """
    on = {name: x.to(pages.device) for name, x in copy.tensors.items() if not name.startswith(OF_SHARD)}
    tables = []
    for layer in pages.layers:
        tables.append([])
        for level, pool in enumerate(layer.pools):
            arrive: dict[int, tuple[ShardCopy, Tensor]] = {}
            for at, shard in enumerate(pages.map.local):
                of_shard = {name: x.to(pages.device) for name, x in _of(copy, layer.index, level, shard).items()}
                if any(name.startswith("seat ") for name in of_shard):
                    pool.part_counters()
                arrive[at] = of_shard, copy_in(pool, of_shard)
            tables[-1].append(arrange(pool, {}, arrive, pages.map.num_local))
    of_rows, beside = ({name.removeprefix(start): x for name, x in on.items() if name.startswith(start)} for start in (ROW, BESIDE))
    pages.rows.put(CopiedRows(copy.about["ints"], of_rows, beside))
    pages.directory.put(copy.lens, on.get(HOMES), on[EVICTED])
    pages.rehome(pages.map, tables, pages.new_counts(len(copy.lens)))
    pages.counters.loaded += sum(int(counts.sum()) for counts in pages.counts)
    pages.settle_rows()
    pages.room.shrink()


def _of(copy: RowsCopy, layer: int, level: int, shard: int) -> ShardCopy:
    start = f"{OF_SHARD} {layer} {level} {shard} "
    return {name[len(start) :]: x for name, x in copy.tensors.items() if name.startswith(start)}

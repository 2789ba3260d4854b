"""What a layer's queries read, copied while a graph is recorded, so that backward can compute the same attention once more.

Pages change after a forward: they are evicted, encoded, taken by other rows. So backward can't look at them, and what was read is kept, as
transformers' own caches keep keys and values. R rows, T queries per row, S shards, H kv heads, L slots of all tables of a row; X is H where
every head has pages of its own, else 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from pikv_ds import ops
from pikv_ds.codecs.maps import Transform
from pikv_ds.codecs.request_maps import PageMaps, RequestMaps
from pikv_ds.pages.capped import CappedReader
from pikv_ds.pages.pool import PagePool
from pikv_ds.pages.rows import IntColumn, Rows
from pikv_ds.pages.unrotated import UnrotatedReader
from pikv_ds.pages.view import PageView
from pikv_ds.step.step import Step


class Seen(NamedTuple):
    """Entries of one pool as queries met them; 0 where there is none."""

    k: Tensor
    """[R, H, L, Dk], of raw pages in their dtype, else f32."""
    v: Tensor | None
    """[R, H, L, Dv]; None: the first columns of k (a latent)."""
    visible: Tensor
    """[R, 1 or T, X or 1, L] bool: what each query read."""
    own: Tensor | None
    """[R, X or 1, L] bool: the entry of the query itself; None: queries do not read it."""
    maps: PageMaps | None
    """Between queries as they come and this pool's entries."""
    rebuilt: Transform | None
    """Between what is stored of a key and what queries meet; None: the same."""


@dataclass(slots=True)
class Record:
    """Of one layer of a forward; filled by PiKVCache.attend.

    entries: this forward's entries have a graph themselves. Memory: a copy of the layer's visible entries (decoded: raw pages as wide as
    stored, others 4 bytes a number) and a bit mask as long, until the graph is freed.
    """

    entries: bool
    parts: list[Seen] = field(default_factory=list)
    maps: PageMaps | None = None
    """Between the entries that the layer is given and the nearest pool's."""
    positions: Tensor | None = None
    """[R, T] int32."""
    refusal: str | None = None
    """Why backward would not be right; None: it is."""
    fitted_now: bool = False
    """The maps follow from this forward's own entries."""

    def open(self, maps: PageMaps | None, positions: Tensor, *, fitted_now: bool) -> None:
        self.maps, self.positions, self.fitted_now = _kept(maps), positions, fitted_now and isinstance(maps, RequestMaps)

    def add(self, window: int | None, step: Step, pool: PagePool, view: PageView, rows: slice, choices: list[Tensor] | None) -> None:
        """A pool has been read, but for its choices all of it. Sync: none."""
        if self.refusal is None and pool.num_pages and pool.table.num_rows:
            part, self.refusal = seen(step, pool, view, rows, window, choices)
            self.parts.append(part)

    def close(self, graph_from: IntColumn, step: Step, num_ranks: int) -> None:
        """The layer has been answered: whether backward can be right, and from where on its entries have a graph. Sync: none."""
        values, before = graph_from.values, step.lens_before_host
        if num_ranks > 1:
            self.refusal = f"the entries lie on {num_ranks} ranks, and each knows the gradient of its own; run it on one rank, or detach"
        elif any(0 < value <= length for value, length in zip(values, before, strict=True)):
            self.refusal = (
                "cached tokens were stored by an earlier forward that recorded a graph, and their gradient can't be followed into it; run "
                "that forward under torch.no_grad(), or all tokens in one forward"
            )
        elif self.fitted_now and step.all_see_own:
            self.refusal = "the bases of codec svd were fitted to the very token that reads them; start a request with two tokens or more"
        if self.entries:
            for row, new in enumerate(step.num_new):
                if new and not values[row]:
                    values[row] = before[row] + 1


def declare(rows: Rows) -> IntColumn:
    """1 + the first token of each row whose entry was stored by a forward with a graph; 0 = there is none, or it was cropped."""
    return rows.ints("graph_from", lambda value, keep, shared: value if value <= keep else 0)


def _kept(maps: PageMaps | None) -> PageMaps | None:
    """Maps that stay as they are: those of requests are fitted again in place."""
    return RequestMaps(maps.k.clone(), maps.v.clone()) if isinstance(maps, RequestMaps) else maps


def seen(
    step: Step,
    pool: PagePool,
    view: PageView,
    rows: slice,
    window: int | None,
    choices: Iterable[Tensor] | None = None,
) -> tuple[Seen, str | None]:
    """A copy of what the rows' queries read of a pool, and why their gradient would not be right, if it would not.

    choices: per block of queries the columns [Q * S, X or 1, K] int32 that were read (-1 = none); None: all. Sync: none.
    """
    num_rows, at = rows.stop - rows.start, step.query_positions(rows.start, rows.stop - rows.start)
    columns = min(max(step.lens_after_host) // pool.page_size + 1, view.block_table.shape[-1])
    view = view._replace(block_table=view.block_table[..., :columns])
    k, v, held, positions = _entries(pool, view)
    k, v = (x.unflatten(0, (num_rows, -1)).transpose(1, 2).flatten(2, 3) for x in (k, v))
    held, positions = (x.unflatten(0, (num_rows, -1)).transpose(1, 2).flatten(2, 3) for x in (held, positions))
    k, v = (torch.where(held.unsqueeze(-1), x, 0) for x in (k, v))
    if pool.fmt.raw:
        dtype = ops.views(pool.pages[:0], pool.fmt)[0].dtype
        k, v = k.to(dtype) if not pool.reader.rebuilds else k, v.to(dtype)
    visible = held.unsqueeze(1)
    if window is not None:
        visible = visible & (positions.unsqueeze(1) > at[:, :, None, None] - window)
    if choices is not None:
        shards = view.block_table.shape[0] // num_rows
        chosen = torch.cat([_listed(each, columns, pool.page_size).unflatten(0, (num_rows, -1, shards)) for each in choices], 1)
        visible = visible & chosen.transpose(2, 3).flatten(3, 4)
    own, refusal = None, None
    if step.all_see_own and pool.level == 0:
        own = held & (positions == at[:, :1, None])
        if not pool.fmt.raw:
            refusal = (
                f"a query of one token reads its own entry from {pool.fmt.label} pages, and rounding to codes has no gradient; feed two "
                "tokens or more, or keep recent entries raw (compression.raw_recent_tokens)"
            )
    rebuilt = pool.reader.maps if pool.reader.rebuilds and not isinstance(pool.reader, CappedReader) else None
    maps = None if pool.maps is None else _kept(pool.maps.of(rows))
    return Seen(k, None if pool.fmt.latent else v, visible, own, maps, rebuilt), refusal


def _entries(pool: PagePool, view: PageView) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """k, v [N, H, L, D], held [N, X, L] bool, positions [N, X, L] of the N tables of a view."""
    if isinstance(pool.reader, UnrotatedReader):
        k, v, held, at = pool.reader.rebuild(view)
        return k.flatten(2, 3), v.flatten(2, 3), held.flatten(2, 3), at.flatten(2, 3)
    num_tables, heads, _ = view.block_table.shape
    table, counts = view.block_table.flatten(0, 1), view.seqlens.flatten()
    tail = None if view.tail is None else view.tail.index_select(0, view.tail_rows.flatten())
    k, v = (x.reshape(num_tables, -1, *x.shape[2:]) for x in pool.decoded(table, counts, tail))
    held = torch.arange(k.shape[2], device=k.device) < counts.unsqueeze(-1)
    at = pool.positions[table.clamp_min(0)].flatten(1)
    return k, v, held.view(num_tables, heads, -1), at.view(num_tables, heads, -1)


def _listed(columns: Tensor, count: int, page_size: int) -> Tensor:
    """[N, X, count * page_size] bool, the slots of listed columns [N, X, K]."""
    listed = torch.zeros(*columns.shape[:2], count + 1, dtype=torch.bool, device=columns.device)
    listed.scatter_(-1, columns.to(torch.int64).remainder(count + 1), True)  # -1 marks the one beyond
    return listed[..., :count].repeat_interleave(page_size, -1)

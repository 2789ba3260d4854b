"""Attention to the pages of a layer on this rank, pool by pool: all of them or those that a router chooses, watched or not.

R rows, T queries per row, H heads, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds import ops
from pikv_ds.codecs.request_maps import PageMaps
from pikv_ds.pages.layer import LayerPages
from pikv_ds.pages.layers import RankPages
from pikv_ds.pages.pool import PagePool
from pikv_ds.pages.view import Before, PageView, Read
from pikv_ds.retention.attention import Shares
from pikv_ds.selection.found import Beside, Found
from pikv_ds.selection.selection import Selection
from pikv_ds.staging import sent
from pikv_ds.step.query import Partial, Query
from pikv_ds.step.step import Step


class Reader:
    """Reads what is stored, between the append of a layer's entries and the exchange of partials. Owns nothing."""

    def __init__(self, pages: RankPages, selection: Selection | None, shares: tuple[Shares, ...]) -> None:
        """shares: who is shown what queries attend to; never two of a layer at once (blueprint/window.py)."""
        self.pages, self.selection, self.watching = pages, selection, shares
        self._shares = {i: next((one for one in shares if one.watches(i)), None) for i in range(len(pages.layers))}

    def shares(self, layer: int) -> Shares | None:
        """Who is shown what the queries of this layer attend to."""
        return self._shares[layer]

    def before(self, step: Step, layer: int) -> Before | None:
        """What readers see that must not see this forward's entries, copied before these are stored; None when all rows see their own."""
        if step.all_see_own:
            return None
        return self.pages.layers[layer].nearest.snapshot(tail_is_old=step.late_experts)

    def read(self, step: Step, query: Query, q: Tensor, row0: int, num_rows: int, before: Before | None) -> Found:
        """Attention of q [num_rows, T, Hq, Dk] to the entries of rows row0 ... held on this rank. Sync: none.

        A pool that a router chooses from comes last: what is read besides takes its share of the budget.
        """
        if num_rows == 0:
            return nothing(q, query.v_dim)
        pages, rows, parts, readers = self.pages.layers[query.layer], slice(row0, row0 + num_rows), [], None
        routed = pages.routed if self.selection is not None else None
        for pool in pages.pools:
            if pool is not routed and pool.num_pages and pool.table.num_rows:
                view = pool.view(rows) if before is None else self._view(step, pool, rows, before)
                view = view if not self.pages.map.copied else view.only(self.read_here(step)[rows])
                parts.append((pool, self._read(step, query, pool, view, q, rows)))
                if query.saw is not None:
                    query.saw(step, pool, view, rows, None)
        if routed is not None:  # also when it is empty: choosing pages may be a collective
            beside = None if len(pages.pools) == 1 else self._beside(step, parts, q, rows, before)
            view = self._view(step, routed, rows, before)
            if query.saw is None:
                found, readers = self._choose(step, query, routed, view, q, rows, beside)
            else:
                choices: list[Tensor] = []
                with self.selection.shown_to(lambda asked, columns: choices.append(columns)):
                    found, readers = self._choose(step, query, routed, view, q, rows, beside)
                query.saw(step, routed, view, rows, choices)
            parts.append((routed, found))
        if len(parts) == 1 and self._shares[query.layer] is None:
            return Found(parts[0][1].out, parts[0][1].lse, (), readers)
        return self._merged(pages, query, q, parts, readers)

    def read_here(self, step: Step) -> Tensor:
        """[R, L] bool: the local shards that this rank reads for the queries of every row, where shards have copies. Sync: none."""

        def made() -> Tensor:
            reads, sources = self.pages.map.reads_here, step.sources
            if len(sources) == 1:
                return reads[-1:].expand(sources[0].num_rows, -1)
            return reads[:-1].repeat_interleave(sent([one.num_rows for one in sources], torch.int64, reads.device), 0)

        return step.once("shards read here", made)

    def _beside(self, step: Step, parts: list[tuple[PagePool, Read]], q: Tensor, rows: slice, before: Before | None) -> Beside:
        """What has been read of the pools that a router does not choose from."""
        lse = torch.full(q.shape[:3], -torch.inf, dtype=torch.float32, device=q.device)
        for _, part in parts:
            lse = torch.logaddexp(lse, part.lse)
        return Beside(tuple(self._view(step, pool, rows, before) for pool, _ in parts), lse)

    def _view(self, step: Step, pool: PagePool, rows: slice, before: Before | None) -> PageView:
        if pool.level or before is None:  # pools behind do not change within a forward
            return pool.view(rows)
        return pool.view(rows, before, step.rows_see_own[rows])

    def _read(self, step: Step, query: Query, pool: PagePool, view: PageView, q: Tensor, rows: slice) -> Read:
        """Of all its pages."""
        window = self.pages.specs[query.layer].window
        q, maps, shift = (q, None, None) if pool.maps is None else _folded(pool, query, q, rows)
        if self._shares[query.layer] is not None and self._watched(query.layer, pool):
            read = pool.reader.attend_pages(q, view, scale=query.scale)
        elif pool.table.heads > 1:
            read = pool.reader.attend_pages(q, view, scale=query.scale)._replace(page_lse=None)
        else:
            needs_positions = window is not None or q.shape[1] > 1
            positions = step.query_positions(rows.start, q.shape[0]) if needs_positions else None
            parts = step.parts(rows.start, q.shape[0]) if q.shape[1] > 1 else None
            read = _attend(pool, q, view, query.scale, window, positions, parts)
        return read if maps is None else _unfolded(read, maps, shift)

    def _choose(
        self, step: Step, query: Query, pool: PagePool, view: PageView, q: Tensor, rows: slice, beside: Beside | None
    ) -> tuple[Read, Tensor | None]:
        """Of the pages that the router chooses. beside: what is read of the other pools; None: there are none. Also the readers."""
        positions = step.query_positions(rows.start, q.shape[0])
        q, maps, shift = _folded(pool, query, q, rows)
        if beside is not None and shift is not None:
            beside = beside._replace(lse=beside.lse - shift)
        watched = self._watched(query.layer, pool)
        found = self.selection.read(step, query, q, rows.start, positions, view, beside, with_page_lse=watched)
        read = Read(found.out, found.lse, *found.page_lse)
        return read if maps is None else _unfolded(read, maps, shift), found.readers

    def _watched(self, layer: int, pool: PagePool) -> bool:
        shares = self._shares[layer]
        return shares is not None and shares.looks_at(pool)

    def _merged(self, pages: LayerPages, query: Query, q: Tensor, parts: list[tuple[PagePool, Read]], readers: Tensor | None) -> Found:
        """parts: in the order of reading."""
        page_lse: tuple[Tensor | None, ...] = ()
        if self.shares(query.layer) is not None:
            by_pool = {pool: part.page_lse for pool, part in parts}
            page_lse = tuple(by_pool.get(pool) for pool in pages.pools)
        if not parts:
            return nothing(q, query.v_dim)._replace(page_lse=page_lse)
        out, lse = parts[0][1][:2]
        if len(parts) > 1:
            out, lse = ops.merge(torch.stack([part.out for _, part in parts]), torch.stack([part.lse for _, part in parts]))
        return Found(out, lse, page_lse, readers)


def _folded(pool: PagePool, query: Query, q: Tensor, rows: slice) -> tuple[Tensor, PageMaps | None, Tensor | None]:
    """Queries as the entries of a pool are, the maps of these rows, and what these leave out of the lse."""
    if pool.maps is None:
        return q, None, None
    maps = pool.maps.of(rows)
    folded, shift = maps.fold(q, query.scale)
    return folded, maps, shift


def _unfolded(read: Read, maps: PageMaps, shift: Tensor | None) -> Read:
    """Attention over a pool's entries, as attention over those that the layer is given."""
    out, lse = maps.leave(Partial(read.out, read.lse, False), shift)[:2]
    page_lse = read.page_lse
    if shift is not None and page_lse is not None:
        page_lse = page_lse + shift[:, :, None, :, None]
    return Read(out, lse, page_lse)


def _attend(
    pool: PagePool, q: Tensor, view: PageView, scale: float, window: int | None, positions: Tensor | None, parts: list | None
) -> Read:
    """parts: Step.parts of the rows, None = all at once. What is padding in a long rectangle would cost as much as what is not."""
    if parts is None:
        return pool.reader.attend(q, view, scale=scale, window=window, q_positions=positions)
    reads = [
        pool.reader.attend(
            q.index_select(0, rows)[:, :columns], view.of_rows(rows, q.shape[0]), scale=scale, window=window,
            q_positions=positions.index_select(0, rows)[:, :columns],
        )
        for rows, columns in parts
    ]  # fmt: skip
    out, lse = nothing(q, reads[0].out.shape[-1])[:2]
    for (rows, columns), read in zip(parts, reads, strict=True):
        out[rows, :columns], lse[rows, :columns] = read.out, read.lse
    return Read(out, lse)


def nothing(q: Tensor, v_dim: int) -> Found:
    out = q.new_zeros(*q.shape[:3], v_dim, dtype=torch.float32)
    return Found(out, torch.full(q.shape[:3], -torch.inf, dtype=torch.float32, device=q.device))

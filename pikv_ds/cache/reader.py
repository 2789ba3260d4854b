"""Attention to the pages of a layer on this rank, in one pool or in two: all of them or those that a router chooses, watched or not.

R rows, T queries per row, H heads, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds.ops import merge_partials
from pikv_ds.pages.layers import Tables
from pikv_ds.pages.pool import LayerStore
from pikv_ds.pages.unrotated import read_turned
from pikv_ds.pages.view import Before, Stored, read_pages, stored_entries
from pikv_ds.retention.attention import Mass
from pikv_ds.retention.retention import Retention
from pikv_ds.selection.selection import Selection
from pikv_ds.step.query import Partial, Query
from pikv_ds.step.step import Source, StepPlan
from pikv_ds.tiers.window import Tiers


class PoolReader:
    """Reads what is stored, between the append of a layer's entries and the exchange of partials. Owns nothing."""

    def __init__(self, tables: Tables, selection: Selection | None, retention: Retention | None, tiers: Tiers | None, stages: bool) -> None:
        """stages: entries are stored after the queries of their layer."""
        self.tables, self.selection, self.retention, self.tiers, self.stages = tables, selection, retention, tiers, stages

    def watcher(self, layer: int) -> Mass | None:
        """Who is shown what the queries of a layer attend to; never two at once (blueprint/window.py)."""
        if self.retention is not None and self.retention.watches(layer):
            return self.retention.mass
        return self.tiers.mass if self.tiers is not None and self.tables.far[layer] is not None else None

    def reads(self, plan: StepPlan, source: Source) -> bool:
        """Whether a source's queries have anything to look up: stored tokens, or their own entry (one column, stored before reading)."""
        return (source.num_columns == 1 and not self.stages) or plan.has_past(source)

    def before(self, plan: StepPlan, layer: int) -> Before | None:
        """What readers see that must not see this forward's entries, copied before these are stored; None when all rows see their own."""
        if plan.decode and not self.stages:
            return None
        store = self.tables.stores[layer]
        # Staged entries are stored after the reading: the tail is still the old one then.
        return Before(store.counts.clone(), None if store.tail is None else store.tail if self.stages else store.tail.clone())

    def read(self, plan: StepPlan, query: Query, q: Tensor, row0: int, num_rows: int, before: Before | None) -> tuple[Tensor, Tensor]:
        """Attention of q [num_rows, T, Hq, Dk] to the entries of rows row0 ... held on this rank: out f32, lse f32."""
        store, far, rows = self.tables.stores[query.layer], self.tables.far[query.layer], slice(row0, row0 + num_rows)
        selects = self.selection is not None and num_rows > 0
        own_visible = None if before is None else plan.one_column[rows] & (not self.stages)
        if far is None:
            if num_rows == 0 or (not selects and (store.num_pages == 0 or store.counts.numel() == 0)):
                return nothing(q, query.v_dim)[:2]
            return self._read_pool(plan, query, store, q, rows, before, own_visible, selects)
        if num_rows == 0:
            return nothing(q, query.v_dim)[:2]
        # The far pool does not change within a forward. It is asked also when it is empty if choosing pages is a collective.
        near = self._read_pool(plan, query, store, q, rows, before, own_visible, False) if store.num_pages else nothing(q, query.v_dim)[:2]
        if not selects and not far.num_pages:
            return near
        maps, shift = self.tables.far_maps[query.layer], None
        if maps is not None:
            maps = maps.of(rows)
        if maps is not None and far.turned is None:
            q, shift = maps.fold(q, query.scale)
        held = None
        if selects:
            held = stored_entries(store, rows, before, own_visible), near[1] if shift is None else near[1] - shift
        beside = self._read_pool(plan, query, far, q, rows, None, None, selects, held)
        if maps is not None:
            beside = maps.leave(Partial(*beside, False), shift)[:2]
        if shift is not None and self.retention is not None and self.retention.watches(query.layer):
            self.retention.mass.shift(far, row0, shift)
        return merge_partials(torch.stack([near[0], beside[0]]), torch.stack([near[1], beside[1]]))

    def _read_pool(
        self,
        plan: StepPlan,
        query: Query,
        store: LayerStore,
        q: Tensor,
        rows: slice,
        before: Before | None,
        own_visible: Tensor | None,
        selects: bool,
        near: tuple[Stored, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """near: what a router is told of the entries that are read besides, and their lse."""
        window, mass = self.tables.layers[query.layer].window, self.watcher(query.layer)
        if self.tiers is not None and mass is self.tiers.mass and store is self.tables.far[query.layer]:
            mass = None  # what is far never comes back, however important
        if not selects and (self.tables.heads > 1 or mass is not None):
            mass = self.retention.mass if mass is None else mass
            return mass.read(store, q, rows.start, stored_entries(store, rows, before, own_visible), query.scale)
        needs_positions = selects or window is not None or q.shape[1] > 1
        positions = plan.query_positions(rows.start, q.shape[0]) if needs_positions else None
        if selects:
            stored = stored_entries(store, rows, before, own_visible)
            out, lse, page_lse = self.selection.read(query, q, rows.start, positions, stored, plan, near, with_page_lse=mass is not None)
            if mass is not None:
                mass.keep(store, rows.start, page_lse)
            return out, lse
        options = {"scale": query.scale, "window": window, "q_positions": positions}
        read = read_pages if store.turned is None else read_turned
        return read(store, q, rows, before, own_visible, **options)


def nothing(q: Tensor, v_dim: int) -> Partial:
    out = q.new_zeros(*q.shape[:3], v_dim, dtype=torch.float32)
    return Partial(out, torch.full(q.shape[:3], -torch.inf, device=q.device), False, True)

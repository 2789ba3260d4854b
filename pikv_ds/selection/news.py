"""What a router is told: entries that were stored, have moved, are others or in another basis now, and which row continues which."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pikv_ds.codecs.request_maps import Turn
from pikv_ds.codecs.rope import turn
from pikv_ds.pages.entries import keys_at
from pikv_ds.pages.events import NewEntries, TurnedEntries, Written
from pikv_ds.pages.layers import Tables
from pikv_ds.pages.move import Moved
from pikv_ds.pages.pool import LayerStore
from pikv_ds.routers.base import Router
from pikv_ds.step.step import StepPlan

from .window_news import entries_moved


class RouterNews:
    """Owns the entries that a router is not told of yet; borrows router and tables."""

    def __init__(self, router: Router, tables: Tables, stages: bool) -> None:
        """stages: entries are stored after the queries of their layer."""
        self.router, self.tables, self.stages = router, tables, stages
        self._waiting: list[tuple[int, NewEntries]] = []

    def open(self) -> None:
        """The stores are new and empty. Host phase."""
        self._waiting.clear()
        for layer in range(len(self.tables.layers)):
            store = self.store(layer)
            others = len(store.summaries)
            self.router.open(layer, store, self.tables.num_shards, self.tables.rows)
            assert len(store.summaries) == others or self.router.summarises, f"router {self.router.name!r} adds summaries: declare it"

    def store(self, layer: int) -> LayerStore:
        """The pages that a router chooses from."""
        return self.tables.pools(layer)[-1]

    def wrote(self, layer: int, plan: StepPlan, k: Tensor, written: Written) -> None:
        """Entries of a layer were stored: those that queries of their own forward must not see wait until these have been answered."""
        self.settle()
        shard, table = written.shard, plan.rows
        maps, turned = self.tables.far_maps[layer], self.store(layer).turned
        if maps is not None:
            k = maps.k.apply(k if turned is None else turn(k, plan.positions, turned.inv_freq, back=True))
        if turned is not None:  # what queries will meet
            k = turned.keys(k, plan.positions)
        if shard is not None:
            table = torch.where(written.here, table * self.tables.num_local + self.tables.map.index[shard], 0)
        new = NewEntries(
            k=k, rows=plan.rows, positions=plan.positions, shard=torch.zeros_like(plan.rows) if shard is None else shard,
            valid=written.valid, slot_mapping=written.slot_mapping, table=table.to(torch.int32),
        )  # fmt: skip
        if self.tables.far[layer] is not None:  # in no page that the router chooses from yet
            new = replace(new, slot_mapping=torch.full_like(new.slot_mapping, -1), table=torch.zeros_like(new.table))
        if plan.decode or self.stages:  # staged entries are stored after the queries of their layer
            self._report(layer, new)
        elif any(source.num_columns == 1 and source.num_rows for source in plan.sources):
            now = plan.one_column[plan.rows]
            self._report(layer, _those(new, now))
            self._waiting.append((layer, _those(new, ~now)))
        else:
            self._waiting.append((layer, new))

    def settle(self) -> None:
        """Report the entries that the queries of their own forward must not see. Call it before pages move."""
        for layer, new in self._waiting:
            self._report(layer, new)
        self._waiting.clear()

    def _report(self, layer: int, new: NewEntries) -> None:
        self.router.wrote(layer, self.store(layer), new)

    def demoted(self, moved: list[tuple[int, Moved]]) -> None:
        """Pages have come into the far pools of layers. Host phase."""
        for layer, pages in moved:
            store = self.store(layer)
            self.router.moved(layer, store, entries_moved(store, pages, self.tables.map.shards))

    def turned(self, layer: int, turn: Turn) -> None:
        """Keys of some rows of a layer have another basis, and their pages hold other numbers. Host phase."""
        store = self.tables.stores[layer]
        counts, num_local = store.counts[turn.rows].flatten(), self.tables.num_local
        held = torch.arange(int(counts.max()), device=counts.device) < counts.unsqueeze(-1)
        cell, index = torch.nonzero(held, as_tuple=True)
        table = turn.rows[cell // num_local] * num_local + cell % num_local
        entries = self._stored(layer, table, index)
        self.router.turned(layer, store, TurnedEntries(rows=turn.rows, turn=turn.by, entries=entries))

    def _stored(self, layer: int, table: Tensor, index: Tensor) -> NewEntries:
        """The entries `index` [n] of tables `table` [n] (row * local shards + shard, ascending)."""
        store = self.tables.stores[layer]
        page = store.block_table.flatten(0, 1)[table, index // self.tables.page_size].to(torch.int64)
        offset, num_local = index % self.tables.page_size, self.tables.num_local
        k, positions = keys_at(store, table, index), store.positions[page, offset]
        return NewEntries(
            k=k if store.turned is None else store.turned.keys(k, positions), rows=table // num_local, positions=positions,
            shard=self.tables.map.shards[table % num_local], valid=torch.ones_like(page, dtype=torch.bool),
            slot_mapping=(page * self.tables.page_size + offset).to(torch.int32), table=table.to(torch.int32),
        )  # fmt: skip


def _those(new: NewEntries, mask: Tensor) -> NewEntries:
    return replace(new, valid=new.valid & mask, slot_mapping=torch.where(mask, new.slot_mapping, -1))

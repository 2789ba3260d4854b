"""What a router is told: entries that were stored, have come from another pool, or are in another basis now."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pikv_ds.pages.events import NewEntries, PageChange, Written
from pikv_ds.pages.layers import RankPages
from pikv_ds.routers.base import Router
from pikv_ds.step.step import Step


class RouterNews:
    """Owns the entries that a router is not told of yet; borrows router and pages, and listens to their events."""

    def __init__(self, router: Router, pages: RankPages) -> None:
        self.router, self.pages = router, pages
        self._waiting: list[tuple[int, NewEntries]] = []
        for layer in pages.layers:
            layer.events.wrote += (self.wrote,)
            layer.events.rebuilt += (self.rebuilt,)

    def start(self) -> None:
        """The pools are new and empty. Host phase."""
        self._waiting.clear()
        for layer in self.pages.layers:
            pool, others = layer.routed, len(layer.routed.summaries)
            self.router.open(layer.index, pool, self.pages.num_shards, self.pages.rows)
            assert len(pool.summaries) == others or self.router.summarises, f"router {self.router.name!r} adds summaries: declare it"

    def wrote(self, layer: int, step: Step, k: Tensor, written: Written) -> None:
        """Entries of a layer were stored: those that queries of their own forward must not see wait until these have been answered."""
        self.flush()
        shard, table, pool = written.shard, step.rows, self.pages.layers[layer].routed
        if pool.maps is not None:
            k = pool.maps.encode_keys(k, step.positions)
        if shard is not None:
            table = torch.where(written.here, table * self.pages.num_local + self.pages.map.index[shard], 0)
        new = NewEntries(
            k=pool.reader.met(k, step.positions), rows=step.rows, positions=step.positions,
            shard=torch.zeros_like(step.rows) if shard is None else shard, valid=written.valid, slot_mapping=written.slot_mapping,
            table=table.to(torch.int32),
        )  # fmt: skip
        if pool.level:  # in no page that the router chooses from yet
            new = replace(new, slot_mapping=torch.full_like(new.slot_mapping, -1), table=torch.zeros_like(new.table))
        if step.decode or step.late_experts:  # late entries are stored after the queries of their layer
            self._report(layer, new)
        elif any(source.num_columns == 1 and source.num_rows for source in step.sources):
            now = step.one_column[step.rows]
            self._report(layer, _those(new, now))
            self._waiting.append((layer, _those(new, ~now)))
        else:
            self._waiting.append((layer, new))

    def flush(self) -> None:
        """Report the entries that the queries of their own forward must not see. Call it before pages move."""
        for layer, new in self._waiting:
            self._report(layer, new)
        self._waiting.clear()

    def rebuilt(self, change: PageChange) -> None:
        """Pages of the pool that the router chooses from hold other numbers. Host phase."""
        pool = self.pages.layers[change.layer].routed
        if change.level == pool.level:
            self.router.rebuilt(change.layer, pool, change)

    def _report(self, layer: int, new: NewEntries) -> None:
        self.router.wrote(layer, self.pages.layers[layer].routed, new)


def _those(new: NewEntries, mask: Tensor) -> NewEntries:
    return replace(new, valid=new.valid & mask, slot_mapping=torch.where(mask, new.slot_mapping, -1))

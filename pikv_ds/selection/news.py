"""What a router is told: entries that were stored, have come from another pool, or are in another basis now."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial

import torch
from torch import Tensor

from pikv_ds.pages.events import NewEntries, PageChange, PageMove, Written
from pikv_ds.pages.layers import RankPages
from pikv_ds.pages.undoing import WAITING
from pikv_ds.routers.base import Router
from pikv_ds.step.step import Step

from .page_routes import PageRoutes


class RouterNews:
    """Owns the entries that a router is not told of yet; borrows router and pages, and listens to their events.

    Entries of a forward of several tokens wait until its queries have been answered; the last ones of a forward that may be taken back
    until the next one begins (pages/undoing.py).
    """

    def __init__(self, router: Router, pages: RankPages, routes: PageRoutes | None) -> None:
        """routes: told of what the router has been told of; None: nobody asks."""
        self.router, self.pages, self.routes = router, pages, routes
        self._waiting: list[tuple[int, NewEntries]] = []
        self._tentative: list[tuple[int, NewEntries]] = []
        for layer in pages.layers:
            layer.events.wrote += (self.wrote,)
            layer.events.rebuilt += (self.rebuilt,)
            layer.events.moved += (partial(self._moved, layer.index),)

    def start(self) -> None:
        """The pools are new and empty. Host phase."""
        self._waiting.clear()
        self._tentative.clear()
        summaries: dict[str, None] = {}
        for layer in self.pages.layers:
            pool, others = layer.routed, len(layer.routed.summaries)
            before = set(pool.summaries)
            self.router.open(layer.index, pool, self.pages.num_shards, self.pages.rows)
            assert len(pool.summaries) == others or self.router.summarises, f"router {self.router.name!r} adds summaries: declare it"
            summaries |= dict.fromkeys(name for name in pool.summaries if name not in before)
        if self.routes is not None:
            self.routes.start(tuple(summaries))

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
            shard=step.once("the only shard", partial(torch.zeros_like, step.rows)) if shard is None else shard,
            valid=written.valid, slot_mapping=written.slot_mapping,
            table=table.to(torch.int32) if shard is not None else step.once("the only tables", partial(table.to, torch.int32)),
        )  # fmt: skip
        if pool.level:  # in no page that the router chooses from yet
            new = replace(new, slot_mapping=torch.full_like(new.slot_mapping, -1), table=torch.zeros_like(new.table))
        if step.late_experts and step.tentative and self.router.learns:
            self._wait(layer, step, new)
        elif step.decode or step.late_experts:  # late entries are stored after the queries of their layer
            self._report(layer, new)
        elif any(source.num_columns == 1 and source.num_rows for source in step.sources):
            now = step.one_column[step.rows]
            self._report(layer, _those(new, now))
            self._wait(layer, step, _those(new, ~now))
        else:
            self._wait(layer, step, new)

    def _wait(self, layer: int, step: Step, new: NewEntries) -> None:
        if not (step.tentative and self.router.learns):
            self._waiting.append((layer, new))
            return
        last = last_columns(step, max(s.num_columns for s in step.sources) if self.router.whole_forwards else WAITING)
        if last.numel() < new.rows.numel():
            others = torch.ones_like(new.valid).index_fill_(0, last, False)
            self._waiting.append((layer, _those(new, others)))
        self._tentative.append((layer, NewEntries(**{f.name: getattr(new, f.name)[last] for f in fields(new)})))

    def flush(self) -> None:
        """Report the entries that the queries of their own forward must not see. Call it before pages move."""
        for layer, new in self._waiting:
            self._report(layer, new)
        self._waiting.clear()

    @property
    def waiting(self) -> list[Tensor]:
        """Of the last forward, told of when it is known what stays."""
        return [getattr(new, f.name) for _, new in self._tentative for f in fields(new)]

    def settle(self, kept: Tensor) -> None:
        """Report the entries that waited and stay, now that rows [R] are known to go on with `kept` tokens. Before rows change."""
        tentative, self._tentative = self._tentative, []
        for layer, new in tentative:
            self._report(layer, _those(new, new.positions < kept[new.rows]))

    def _moved(self, layer: int, move: PageMove) -> None:
        """Pages have other ids, and so have the slots of entries that wait."""
        pool = self.pages.layers[layer].routed
        for i, (at, new) in enumerate(self._tentative):
            if at == layer and move.level == pool.level:
                slots = new.slot_mapping
                target = torch.full((int(move.source.max()) + 1,), -1, device=slots.device).index_copy_(0, move.source, move.target)
                moved = target[(slots // pool.page_size).clamp_min(0).long()] * pool.page_size + slots % pool.page_size
                self._tentative[i] = at, replace(new, slot_mapping=torch.where(slots >= 0, moved, -1).to(slots.dtype))

    def rebuilt(self, change: PageChange) -> None:
        """Pages of the pool that the router chooses from hold other numbers. Host phase."""
        pool = self.pages.layers[change.layer].routed
        if change.level == pool.level:
            self.router.rebuilt(change.layer, pool, change)

    def _report(self, layer: int, new: NewEntries) -> None:
        self.router.wrote(layer, self.pages.layers[layer].routed, new)
        if self.routes is not None:
            self.routes.wrote(layer, new)


def last_columns(step: Step, columns: int) -> Tensor:
    """[n] int64, ascending: where the last real tokens of every row, `columns` of them, lie among those of all sources. Sync: none."""
    found, valid = [], step.valid.view(len(step.sources), -1)
    for i, source in enumerate(step.sources):
        own = valid[i, : source.num_tokens].view(source.num_rows, source.num_columns)
        at = own.to(torch.int8).argsort(dim=-1, stable=True)[:, -columns:].sort(-1).values  # padding first
        first = torch.arange(source.num_rows, device=at.device).unsqueeze(1) * source.num_columns
        found.append((at + first).flatten() + i * step.num_tokens)
    return torch.cat(found)


def _those(new: NewEntries, mask: Tensor) -> NewEntries:
    return replace(new, valid=new.valid & mask, slot_mapping=torch.where(mask, new.slot_mapping, -1))

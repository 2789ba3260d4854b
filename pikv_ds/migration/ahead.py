"""Pages that are copied before their shard moves, while their own rank still serves it. n pages of one pool, one after the other.

A page is taken from here at the commit only if it still has the bytes that were copied, which its digest says. So whatever happens in
between (pages leave, rows fork, entries are encoded again) costs at most that they are sent once more.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pikv_ds.exchange.digest import row_digests
from pikv_ds.pages.events import PageMove
from pikv_ds.pages.layers import RankPages
from pikv_ds.pages.pool import PagePool
from pikv_ds.pages.shard_copy import pages_of


class Place(NamedTuple):
    """A pool of a layer, and the rank that its pages go to or come from."""

    rank: int
    layer: int
    level: int


class Ledger:
    """What this rank has copied to others: ids as they are now (-1: not known any more) and digests, in the order of sending."""

    def __init__(self, pages: RankPages) -> None:
        self.pages = pages
        self.ids: dict[Place, Tensor] = {}
        self.digests: dict[Place, Tensor] = {}
        self.nbytes = 0  # of records that were sent
        self._watchers = [(layer, partial(self._moved, layer.index)) for layer in pages.layers]
        for layer, watcher in self._watchers:
            layer.events.moved += (watcher,)

    def close(self) -> None:
        """Ends listening."""
        for layer, watcher in self._watchers:
            layer.events.moved = tuple(tell for tell in layer.events.moved if tell is not watcher)

    def take(self, place: Place, pool: PagePool, shard: int, at_most: int) -> tuple[Tensor, int]:
        """Up to `at_most` full pages of a local shard that were not copied yet: records [n, bytes], and how many more there are."""
        known = self.ids.get(place, torch.zeros(0, dtype=torch.int64, device=pool.device))
        full = _full_pages(pool, shard)
        new = full[~torch.isin(full, known)]
        chosen = new[: max(at_most, 0)]
        records = pool.pages.index_select(0, chosen)
        if len(chosen):
            self.nbytes += records.nbytes
            self.ids[place] = torch.cat([known, chosen])
            self.digests[place] = torch.cat([self.digests.get(place, known[:0]), row_digests(records)])
        return records, len(new) - len(chosen)

    def find(self, place: Place, digests: Tensor) -> Tensor:
        """[n] int64: where pages with these digests are among those that were copied, -1 = nowhere."""
        known = self.digests.get(place)
        if known is None:
            return torch.full_like(digests, -1)
        order = known.argsort()
        at = torch.searchsorted(known[order], digests).clamp_max(len(known) - 1)
        return torch.where(known[order][at] == digests, order[at], -1)

    def _moved(self, layer: int, move: PageMove) -> None:
        """Pages have other ids. Those that are not told of are free."""
        for place, ids in self.ids.items():
            if place.layer == layer and place.level == move.level and not move.copied:
                new = torch.full((int(torch.cat([ids, move.source]).max()) + 1,), -1, device=ids.device)
                new[move.source] = move.target
                self.ids[place] = torch.where(ids >= 0, new[ids.clamp_min(0)], -1)


class Arrivals:
    """What other ranks have copied here, in the order of its coming."""

    def __init__(self) -> None:
        self._parts: dict[Place, list[Tensor]] = {}

    def add(self, place: Place, records: Tensor) -> None:
        if len(records):
            self._parts.setdefault(place, []).append(records)

    def whole(self, place: Place, slots: Tensor, rest: Tensor) -> Tensor:
        """[n, bytes]: page i is the slots[i]-th that came ahead, or (-1) the next of `rest`."""
        if not len(slots):
            return rest
        records = rest.new_empty(len(slots), rest.shape[1])
        late = slots < 0
        records[late] = rest
        if not bool(late.all()):
            records[~late] = torch.cat(self._parts[place])[slots[~late]]
        return records

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for parts in self._parts.values() for part in parts)


def _full_pages(pool: PagePool, shard: int) -> Tensor:
    """[n] int64, ascending: pages of a local shard that a table has filled, so that no row writes to them."""
    pages, index = pages_of(pool, shard)
    heads = pool.table.heads
    counts = pool.table.counts[:, shard * heads : (shard + 1) * heads]
    full = torch.arange(index.shape[-1], device=pool.device) < (counts // pool.page_size).unsqueeze(-1)
    return pages[torch.unique(index[full & (index >= 0)].long())]

"""A decode query's way with pikv.routing.exchange "routed" and a router of pages: its own rank chooses, from an outline of its pages.

Exactly the pages that all ranks would choose together: an outline has the same bits as the pages' own ranks, or is not used. While some
rank still owes news, queries go to all ranks, and the news ride in the answers. G ranks, R rows, B rows of this rank, S shards, H kv heads
that choose for themselves (1 = all alike).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds.config.routing import RoutingConfig
from pikv_ds.exchange.exchange import Exchange
from pikv_ds.pages.events import NewEntries
from pikv_ds.pages.layers import RankPages
from pikv_ds.pages.rows import RowChange
from pikv_ds.routers.base import Router
from pikv_ds.staging import sent
from pikv_ds.step.step import Source, Step

from .outline import Outline
from .page_news import PageNews, Telling, news_width

KNOWN, WHOLE, SILENT = range(3)
"""What is told of a row: what has changed; all of it, as it is another row than its outline was of; nothing, for it changes just now."""
NEW, LOST = -1, -2
"""In place of a row's parent: it begins; nothing is known of it."""
ROOM = 2**18  # bytes of news that a rank tells another one in a layer, while queries go to all ranks


class PageRoutes:
    """Owns the outlines of this rank's rows, and what is known of their state: the same on all ranks."""

    def __init__(self, router: Router, config: RoutingConfig, pages: RankPages, exchange: Exchange) -> None:
        self.router, self.config, self.pages, self.exchange = router, config, pages, exchange
        self.names: tuple[str, ...] = ()
        self.outlines: list[Outline] = []
        for layer in pages.layers:
            layer.events.dropped += (self.dropped,)
        self.behind = True
        """This rank owes news, or has changed rows: queries must go to all ranks."""
        self.step: Step | None = None
        """The running forward."""
        self.by_rank = False
        """Queries of this forward go only to the ranks that they read."""
        self.forwards = [0, 0]
        """Forwards that sent queries to all ranks, and those that did not."""

    @classmethod
    def serves(cls, router: Router, config: RoutingConfig, pages: RankPages, exchange: Exchange) -> bool:
        """The newest entry must be read in any case: its page's summary is not known before it is stored. Where messages have fixed sizes
        (Exchange.short_messages) nothing would be saved."""
        known = config.recent_tokens >= (2 if pages.storage.expert_ids == "true" else 1)
        return config.exchange == "routed" and exchange.size > 1 and exchange.short_messages and router.by_summary and known

    @property
    def nbytes(self) -> int:
        """Of the outlines."""
        return sum(outline.nbytes for outline in self.outlines)

    def start(self, own_summaries: tuple[str, ...]) -> None:
        """The pools are new and empty. own_summaries: of the router."""
        self.names = own_summaries
        self.telling = Telling(self.pages, self.config, self.names)
        self.telling.start()
        num_rows = self.pages.rows.num_rows
        self.version, self.lens, self.evicted = self.pages.rows.version, [0] * num_rows, self._evicted()
        self.standing, self.outlines, self.behind, self.complete = [KNOWN] * num_rows, [], True, True
        self.change: RowChange | None = None
        self.shapes: list[tuple[int, int]] = []
        """(first row, rows) of every rank in the last forward; empty: there was none."""
        self.followed = self.missed = False
        """What a budget has taken since is gone from the outlines as well; not all of it."""

    def wrote(self, layer: int, new: NewEntries) -> None:
        self.telling.wrote(layer, new)

    # ---- once per forward ----------------------------------------------------------------------------------------------------

    def follow(self, change: RowChange) -> None:
        """Rows are about to change. Before they do; host phase."""
        self.change = change if self.pages.rows.version == self.version and self.change is None else None

    def dropped(self, layer: int, gone: Tensor) -> None:
        """A budget takes pages gone [R, S, C] bool, of all shards. Host phase; no sync."""
        if self.change is None and self.step is None and len(gone) == len(self.lens) and self.outlines:
            begin = self.shapes[self.exchange.rank][0]
            self.outlines[layer].drop(gone[begin : begin + len(self.outlines[layer].counts)])
            self.followed = True
        else:
            self.missed = True

    def begin(self, step: Step, nobody_behind: bool) -> None:
        """nobody_behind: all ranks have said so. Host phase."""
        self.step, own = step, step.sources[step.own]
        before, shapes = self.shapes, [(source.row0, source.num_rows) for source in step.sources]
        parent, lost = self._parents(step, before, shapes), self._evicted()
        evicted = lost if self.followed and not self.missed else self.evicted
        lens = [0 if p == NEW else self.lens[p] if p >= 0 else -1 for p in parent]
        took = [(0,) * 0 if p < 0 else evicted[p] for p in parent]
        changed = [
            p != NEW and (p < 0 or n != at or then != now)
            for p, n, at, then, now in zip(parent, lens, step.lens_before_host, took, lost, strict=True)
        ]
        self.standing = [KNOWN if p < 0 else self.standing[p] for p in parent]
        if parent != list(range(len(self.lens))) or shapes != before or not self.outlines:
            self._move(parent, before, own)
        if any(changed):
            self.telling.forget(None if all(changed) else changed)
            self.standing = [SILENT if new else old for new, old in zip(changed, self.standing, strict=True)]
            rows = sent(changed[own.row0 : own.row0 + own.num_rows], torch.bool, self.pages.device)
            for outline in self.outlines:
                outline.forget(rows)
        for outline in self.outlines if own.num_rows else ():
            outline.reserve(own.num_columns, max(step.lens_after_host[own.row0 : own.row0 + own.num_rows]))
        self.by_rank = nobody_behind and not any(self.standing) and step.decode and not step.tentative
        self.forwards[self.by_rank] += 1
        self.whole, self.silent = (
            sent([each == state for each in self.standing], torch.bool, self.pages.device) for state in (WHOLE, SILENT)
        )
        self.version, self.evicted, self.lens, self.shapes = self.pages.rows.version, lost, step.lens_after_host, shapes
        self.complete, self.told, self.change, self.followed, self.missed = True, 0, None, False, False

    def _parents(self, step: Step, before: list[tuple[int, int]], shapes: list[tuple[int, int]]) -> list[int]:
        """Per row the one that it was in the last forward, on the same rank; NEW or LOST. The same on all ranks."""
        if not before:
            return [LOST if n else NEW for n in step.lens_before_host]
        if self.change is None:
            same = self.pages.rows.version == self.version and shapes == before
            return list(range(len(step.num_new))) if same else [LOST] * len(step.num_new)
        parent = self.change.parent[: len(step.num_new)]
        keeps = zip(parent, self.change.keep[: len(parent)], strict=True)
        parent = [NEW if p < 0 else p if p < len(self.lens) and n == self.lens[p] else LOST for p, n in keeps]
        for (old, count), (first, rows) in zip(before, shapes, strict=True):
            for row in range(first, first + rows):
                if parent[row] >= 0 and not old <= parent[row] < old + count:
                    parent[row] = LOST
        return parent

    def _move(self, parent: list[int], before: list[tuple[int, int]], own: Source) -> None:
        """Outlines follow the rows of this rank, or begin."""
        if not self.outlines:
            pools = [layer.routed for layer in self.pages.layers]
            self.outlines = [Outline(pool, self.names, own.num_rows, self.pages.num_shards) for pool in pools]
            return
        first = before[self.exchange.rank][0]
        rows = [p - first if p >= 0 else -1 for p in parent[own.row0 : own.row0 + own.num_rows]]
        for outline in self.outlines:
            outline.move(sent(rows, torch.int64, self.pages.device))

    def _evicted(self) -> list[tuple]:
        """Per row, entries that a budget has taken of it."""
        return list(zip(*(tuple(tuple(row) for row in layer) for layer in self.pages.evicted), strict=True))

    def end(self, step: Step) -> None:
        """All layers of a forward have been answered. Host phase."""
        self.step = None
        own, margin = step.sources[step.own], step.margin
        for layer in self.pages.windowed if margin is not None and self.pages.windowed and own.num_rows else ():
            at = step.lens_after[own.row0 : own.row0 + own.num_rows] - margin
            self.outlines[layer.index].expire(at, layer.spec.window)
        told = self.complete and self.told == len(self.outlines)
        after = {KNOWN: KNOWN, WHOLE: KNOWN if told else WHOLE, SILENT: WHOLE}
        self.standing = [after[each] for each in self.standing]
        self.behind = not (told and step.decode and not step.tentative) or any(self.standing)

    # ---- in a layer ----------------------------------------------------------------------------------------------------------

    def note(self, step: Step, layer: int, valid: Tensor, shard: Tensor) -> None:
        """Where this rank's entries of a layer go: valid [n] bool, shard [n] int64. Sync: none."""
        own = step.sources[step.own]
        tokens = slice(step.own * step.num_tokens, step.own * step.num_tokens + len(valid))
        self.outlines[layer].note(step.rows[tokens] - own.row0, step.positions[tokens], valid, shard)

    def news(self, step: Step, layer: int) -> tuple[list[Tensor], int]:
        """What this rank tells the others with its answers: for each packed uint8 [m, width], and the most that m can be on any rank.

        Sync: how much there is.
        """
        pool, rows = self.pages.layers[layer].routed, max(source.num_rows for source in step.sources)
        most = rows * (2 + (pool.fmt.group // pool.block_size if pool.fmt.grouped else 0))  # a group that is full changes its blocks
        if not self.by_rank:
            most = max(most, ROOM // news_width(pool, self.names))
        packed, left = self.telling.news(layer, step, self.whole, self.silent, most)
        self.complete, self.told = self.complete and not left, self.told + 1
        return packed, most

    def hear(self, layer: int, packed: Tensor) -> None:
        """packed uint8 [m, width], what all ranks have told this one. Sync: which columns there are."""
        self.outlines[layer].put(PageNews.of(packed, self.pages.layers[layer].routed, self.names))

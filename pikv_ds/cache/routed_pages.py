"""Queries of a router of pages with pikv.routing.exchange "routed": which ranks they go to, what these read, and the way back.

A decode query's own rank chooses from an outline of its pages (selection/page_routes.py), and only ranks with chosen pages get it, by kv
head. In other forwards, and while some rank owes news of pages, all ranks get all queries and choose together, with a gather of best keys.
News of pages ride in the answers of both. G ranks, N tokens per rank (padded), n of this one, U units of a query.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds.exchange.answers import answer
from pikv_ds.exchange.routes import QUERIES
from pikv_ds.pages.view import Before
from pikv_ds.selection.page_reads import choose_here, read_chosen
from pikv_ds.selection.routes import count_visible, own_positions
from pikv_ds.step.query import Partial, Query
from pikv_ds.step.step import Step

from .units import Asked, Sent
from .way import Core


class RoutedPages:
    """What a RoutedWay asks of a router of pages. Keeps nothing."""

    def __init__(self, cache: Core) -> None:
        self.cache, self.selection = cache, cache.selection

    @property
    def by_rank(self) -> bool:
        """Whether queries of this forward go only to the ranks that they read."""
        return self.selection.routes is not None and self.selection.routes.by_rank

    def begin(self, step: Step) -> None:
        """A layer begins: the first of a forward whose opening record did not say that nobody owes news."""
        if self.selection.routes is not None and self.selection.routes.step is not step:
            self.selection.routes.begin(step, nobody_behind=False)

    def note(self, step: Step, layer: int, valid: Tensor, shard: Tensor) -> None:
        """Where this rank's entries go."""
        if self.selection.routes is not None:
            self.selection.routes.note(step, layer, valid, shard)

    def end(self, step: Step) -> None:
        """All layers of a forward have been answered."""
        if self.selection.routes is not None:
            self.selection.routes.end(step)

    def ask(self, step: Step, query: Query) -> Asked:
        """Who gets this rank's queries. Sync: none."""
        q = query.q.flatten(0, 1)
        if not self.by_rank:
            num_ranks = len(step.sources)
            return Asked((own_positions(step) >= 0).unsqueeze(0).expand(num_ranks, -1), [q])
        last, ranks = choose_here(self.selection, step, query)  # [B, H], [G, B, H]
        units = last.shape[1]
        return Asked(ranks.flatten(1), [q.unflatten(1, (units, -1)).flatten(0, 1), last.flatten()], units)

    def answer(self, step: Step, query: Query, sent: Sent, before: Before | None) -> Partial:
        """Read what queries have come here for, and bring it back to them."""
        cache, source, routes = self.cache, step.sources[step.own], self.selection.routes
        partials, counts, need = (self._chosen if self.by_rank else self._choose)(step, query, sent, before)
        news, most = [torch.empty(0, 1, dtype=torch.uint8, device=cache.device)] * len(step.sources), 0
        if routes is not None:
            news, most = routes.news(step, query.layer)
        what = f"returning partial attention of layer {query.layer}"
        out, lse, heard = answer(cache.exchange, partials, counts, need, news, most, cache.map.rank_order, what)
        if routes is not None:
            routes.hear(query.layer, heard)
        out, lse = (x.unflatten(0, (step.num_tokens, -1)).flatten(1, 2)[: source.num_tokens] for x in (out, lse))
        shape = query.q.shape[:2]
        return Partial(out.unflatten(0, shape), lse.unflatten(0, shape), step.sees_own(source))

    def _chosen(self, step: Step, query: Query, sent: Sent, before: Before | None) -> tuple[Tensor, list[int] | None, Tensor]:
        """The pages that queries have come here for. Partials [M, Hq / U, Dv + 1], how many of each rank, and who has got this rank's."""
        cache, arrived = self.cache, sent.arrived
        view = cache.pages.layers[query.layer].routed.view(slice(0, len(step.num_new)), before, step.rows_see_own if before else None)
        count_visible(self.selection, step, query, view)
        partials = read_chosen(self.selection, step, query, *arrived.queries, arrived.tokens, sent.units, view)
        return partials, arrived.num_queries, sent.need[QUERIES]

    def _choose(self, step: Step, query: Query, sent: Sent, before: Before | None) -> tuple[Tensor, list[int] | None, Tensor]:
        """The pages that all ranks choose together: all queries have come here. As `_chosen`, by heads that choose for themselves."""
        cache, (q,), tokens = self.cache, sent.arrived.queries, sent.arrived.tokens
        there, num_ranks, longest = tokens >= 0, len(step.sources), step.num_tokens
        queries = q.new_zeros(step.positions.numel() + 1, *q.shape[1:])
        queries[torch.where(there, tokens, -1).long()] = q.masked_fill(~there.view(-1, 1, 1), 0)
        queries = queries[:-1].unflatten(0, (num_ranks, -1))
        partials, readers = [], []
        for run in step.same_shape_runs():
            first, num_rows, begin = run[0], sum(s.num_rows for s in run), step.sources.index(run[0])
            asked = queries[begin : begin + len(run), : first.num_tokens].reshape(num_rows, first.num_columns, *queries.shape[2:])
            found = cache.reader.read(step, query, asked, first.row0, num_rows, before)
            partials.append(torch.cat([found.out, found.lse.unsqueeze(-1)], -1).flatten(0, 1))
            if found.readers is not None:
                readers.append(found.readers)
        whole, sizes = torch.cat(partials), [source.num_tokens for source in step.sources]
        if not readers:  # nobody reads sizes back: a place for every token of every rank
            every = whole.new_zeros(num_ranks, longest, *whole.shape[1:])
            every[..., -1] = -torch.inf
            for at, part in zip(every, whole.split(sizes), strict=True):
                at[: len(part)] = part
            need = torch.ones(num_ranks, longest, dtype=torch.bool, device=whole.device)
            return every.flatten(0, 1), None, need
        readers = torch.cat(readers, 1)  # [G, all tokens, H]
        own, heads = readers.split(sizes, 1)[step.own], readers.shape[2]
        here = readers[cache.exchange.rank]
        counts = [int(of_source.sum()) for of_source in here.split(sizes)]
        need = torch.zeros(num_ranks, longest, heads, dtype=torch.bool, device=whole.device)
        need[:, : sizes[step.own]] = own
        return whole.unflatten(1, (heads, -1)).flatten(0, 1)[here.flatten()], counts, need.flatten(1)

"""A step in which every rank brings requests of its own and a query goes only to the ranks that it reads (routing.exchange "routed").

One all-to-all takes queries to the ranks that hold what they read, and keys and values home; one brings partial attention back. Which ranks
a query reads its own rank knows before (selection/routes.py). G ranks, N tokens per rank (padded), n of this one, S shards.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds.exchange.routes import ENTRIES, QUERIES, Arrived, bring_back, route
from pikv_ds.exchange.wire import Layout, headers_of, no_header
from pikv_ds.pages.view import Before
from pikv_ds.selection.routes import check_unwatched, choose_ranks, count_visible, own_positions, read_arrived, tell_own
from pikv_ds.step.agreement import Announced
from pikv_ds.step.query import LateEntries, Partial, Query
from pikv_ds.step.step import Step

from .distinct import DistinctWay
from .homes import Homes, Placed
from .reader import nothing
from .way import Core


class RoutedWay:
    """The way of a layer for distinct requests. Keeps nothing between layers; works on the cache and its step.

    With a router of shards a query's rank chooses. With one of pages all ranks must see a query, and choose together; then only entries
    and partials travel less.
    """

    def __init__(self, cache: Core) -> None:
        self.cache, self.homes, self.everywhere = cache, Homes(cache.writer), DistinctWay(cache)

    def attend(self, query: Query) -> Partial:
        cache = self.cache
        if cache.step is None:
            self._open(query)
        if cache.agreement.mode == "replicated":  # the requests of the new generation are the same on all ranks
            return cache.ways["replicated"].attend(query)
        step, by_shard = cache.step, not cache.selection.router.budgeted
        if by_shard:
            check_unwatched(cache.selection)
        if step.positions is None:
            step.set_positions(self._gather(step.num_tokens, cache.local.positions.flatten(), "sharing positions").flatten())
        due, wanted = cache.writer.due(step, query), any(step.reads(each) for each in step.sources)
        before = cache.reader.before(step, query.layer) if wanted else None
        partial = Partial(*nothing(query.q, query.v_dim)[:2], False, True)
        if due is not None or wanted:
            need, arrived = self._send(step, query if wanted else None, due)
        if wanted:
            partial = self._by_shard(step, query, need, arrived, before) if by_shard else self._by_page(step, query, arrived, before)
        if step.late_experts:
            step.late = LateEntries(query.layer, query.k, query.v)
        return partial

    def _by_shard(self, step: Step, query: Query, need: Tensor, arrived: Arrived, before: Before | None) -> Partial:
        """Read what queries have come here for, and bring it back to them."""
        cache, source = self.cache, step.sources[step.own]
        view = cache.pages.layers[query.layer].routed.view(slice(0, len(step.num_new)), before, step.rows_see_own if before else None)
        if cache.map.copied:
            view = view.only(cache.reader.read_here(step))
        count_visible(cache.selection, step, query, view)
        q, named = arrived.queries
        out, lse = read_arrived(cache.selection, step, query, q, arrived.tokens, named.bool(), view)
        partials = torch.cat([out, lse.unsqueeze(-1)], -1)
        what = f"returning partial attention of layer {query.layer}"
        out, lse = bring_back(cache.exchange, partials, need[QUERIES], arrived, cache.map.rank_order, what)
        shape, count = query.q.shape[:2], source.num_tokens
        return Partial(out[:count].unflatten(0, shape), lse[:count].unflatten(0, shape), step.sees_own(source))

    def _by_page(self, step: Step, query: Query, arrived: Arrived, before: Before | None) -> Partial:
        """Pages are scored where they lie and chosen over all ranks: all queries have come here."""
        there, q = arrived.tokens >= 0, arrived.queries[0]
        queries = q.new_zeros(step.positions.numel() + 1, *q.shape[1:])
        queries[torch.where(there, arrived.tokens, -1).long()] = q.masked_fill(~there.view(-1, 1, 1), 0)
        queries = queries[:-1].unflatten(0, (len(step.sources), -1))
        return self.everywhere.answer(step, query, queries, before)[0]

    def flush(self, step: Step) -> None:
        """The last layer has no later record to ride in: late entries go home in one collective of their own."""
        if step.late is not None:
            late, step.late = step.late, None
            self._send(step, None, late)

    def _open(self, query: Query) -> None:
        """Plan the forward. The headers of all ranks come before the first record, as its length depends on what they say."""
        cache, agreement, local = self.cache, self.cache.agreement, self.cache.local
        layout = Layout([("positions", (max(agreement.num_rows),), torch.int32)])
        values = {"positions": local.positions.flatten()} if agreement.is_plain(local) else {}
        block = layout.pack(agreement.header_there(local, cache.announced), values, cache.device)
        buffers = cache.exchange.all_gather(block, f"opening a forward at layer {query.layer}")
        headers = headers_of(buffers)
        if not agreement.all_plain(headers):
            cache.agree(headers, query.k)
            return
        cache.open(agreement.continue_plain(local, headers), [Announced.of(header) for header in headers])
        cache.step.set_positions(layout.unpack(buffers)["positions"].reshape(-1))

    def _gather(self, num_tokens: int, own: Tensor, what: str) -> Tensor:
        """int32 [n <= num_tokens] of every rank -> [G, num_tokens], -1 behind those of a rank."""
        cache, layout = self.cache, Layout([("own", (num_tokens,), torch.int32)])
        block = layout.pack(no_header(cache.device), {"own": own}, cache.device)
        return layout.unpack(cache.exchange.all_gather(block, what))["own"]

    def _send(self, step: Step, query: Query | None, due: Query | LateEntries | None) -> tuple[Tensor, Arrived]:
        """Queries go to the ranks that they read, what is due goes home, and is stored there. query: None = nobody reads.

        Returns: [2, G, N] bool, who got this rank's rows; and what has arrived.
        """
        cache, source = self.cache, step.sources[step.own]
        need = torch.zeros(2, len(step.sources), step.num_tokens, dtype=torch.bool, device=cache.device)
        common, entries, queries, placed, by_shard = [], [], [], None, not cache.selection.router.budgeted
        if due is not None:
            ids = due.expert_ids
            ids = torch.full((source.num_tokens,), -1, device=cache.device) if ids is None else ids
            valid, shard, placed = self._place(step, due.layer, ids)
            if by_shard:
                tell_own(cache.selection, step, due.layer, due.k, valid, shard)
            need[ENTRIES, :, : source.num_tokens] = cache.map.held.index_select(1, shard.clamp_min(0)) & valid
            common = [ids.to(torch.int32)] if placed is None else []
            entries = [x for x in (due.k, due.v) if x.shape[-1]]
        if query is not None:
            named, ranks = self._choose(step, query) if by_shard else (None, own_positions(step) >= 0)
            if by_shard:
                cache.rebalancing.note_reads(named)
            need[QUERIES, :, : source.num_tokens] = ranks
            queries = [query.q.flatten(0, 1), *([named.to(torch.uint8)] if by_shard else [])]
        what = f"routing layer {(query or due).layer}"
        arrived = route(cache.exchange, need, common, queries, entries, what)
        if due is not None:
            if placed is None:
                placed = self.homes.place(step, due.layer, arrived.common[0].long())
            k, v = (
                arrived.entries
                if len(entries) == 2
                else (arrived.entries[0], due.v.new_empty(arrived.entry_tokens.numel(), *due.v.shape[1:]))
            )
            keys, written = self.homes.store(step, due.layer, placed, arrived.entry_tokens, k, v)
            if not by_shard:  # pages are scored where they lie
                cache.selection.news.wrote(due.layer, step, keys, written)
        return need, arrived

    def _place(self, step: Step, layer: int, ids: Tensor) -> tuple[Tensor, Tensor, Placed | None]:
        """valid [n] and shard [n] of this rank's entries. Where entries may spill, where they go depends on those of all ranks, whose ids
        are gathered first; then also where all of them go."""
        if not step.may_spill[layer]:
            return *self.homes.place_own(step, layer, ids), None
        of_all = self._gather(step.num_tokens, ids.to(torch.int32), f"sharing the expert ids of layer {layer}, which may spill")
        placed = self.homes.place(step, layer, of_all.flatten().long())
        own = slice(step.own * step.num_tokens, step.own * step.num_tokens + ids.numel())
        return placed.valid[own], placed.shard[own], placed

    def _choose(self, step: Step, query: Query) -> tuple[Tensor, Tensor]:
        """[n, S] bool shards that own queries read, [G, n] bool ranks that they go to."""
        source, num_shards = step.sources[step.own], self.cache.map.num_shards
        if not source.num_tokens or not step.reads(source):
            nowhere = torch.zeros(max(num_shards, len(step.sources)), source.num_tokens, dtype=torch.bool, device=self.cache.device)
            return nowhere[:num_shards].T, nowhere[: len(step.sources)]
        return choose_ranks(self.cache.selection, step, query)

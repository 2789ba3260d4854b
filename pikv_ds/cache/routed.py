"""A step in which every rank brings requests of its own and a query goes only to the ranks that it reads (routing.exchange "routed").

One all-to-all takes queries to the ranks that hold what they read, and keys and values home; one brings partial attention back. Which ranks
a query reads its own rank knows before (selection/routes.py, selection/page_routes.py). G ranks, N tokens per rank (padded), n of this one,
S shards, U units of a query that travel apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds.exchange.routes import ENTRIES, QUERIES, Arrived, bring_back, route
from pikv_ds.exchange.wire import Layout, headers_of, no_header
from pikv_ds.pages.view import Before
from pikv_ds.selection.routes import check_unwatched, choose_ranks, count_visible, read_arrived, tell_own
from pikv_ds.step.agreement import Announced
from pikv_ds.step.query import LateEntries, Partial, Query
from pikv_ds.step.step import Step

from .homes import Homes, Placed
from .reader import nothing
from .routed_pages import RoutedPages
from .units import Asked, Sent, from_units, in_units, token_of
from .way import Core


class RoutedWay:
    """The way of a layer for distinct requests. Keeps nothing between layers; works on the cache and its step.

    A query's rank chooses: shards, or pages from an outline of them. While that does not serve, all ranks see a query of a router of pages
    and choose together; then only entries and partials travel less.
    """

    def __init__(self, cache: Core) -> None:
        self.cache, self.homes = cache, Homes(cache.writer)
        self.pages = RoutedPages(cache) if cache.selection.router.budgeted else None

    def attend(self, query: Query) -> Partial:
        cache = self.cache
        if cache.step is None:
            self._open(query)
        if cache.agreement.mode == "replicated":  # the requests of the new generation are the same on all ranks
            return cache.ways["replicated"].attend(query)
        step = cache.step
        if self.pages is None:
            check_unwatched(cache.selection)
        if step.positions is None:
            step.set_positions(self._gather(step.num_tokens, cache.local.positions.flatten(), "sharing positions").flatten())
        if self.pages is not None:
            self.pages.begin(step)
        due, wanted = cache.writer.due(step, query), any(step.reads(each) for each in step.sources)
        before = cache.reader.before(step, query.layer) if wanted else None
        partial = Partial(*nothing(query.q, query.v_dim)[:2], False, True)
        if due is not None or wanted:
            sent = self._send(step, query if wanted else None, due)
        if wanted:
            partial = (self._by_shard if self.pages is None else self.pages.answer)(step, query, sent, before)
        if step.late_experts:
            step.late = LateEntries(query.layer, query.k, query.v)
        return partial

    def _by_shard(self, step: Step, query: Query, sent: Sent, before: Before | None) -> Partial:
        """Read what queries have come here for, and bring it back to them."""
        cache, source, arrived = self.cache, step.sources[step.own], sent.arrived
        view = cache.pages.layers[query.layer].routed.view(slice(0, len(step.num_new)), before, step.rows_see_own if before else None)
        if cache.map.copied:
            view = view.only(cache.reader.read_here(step))
        count_visible(cache.selection, step, query, view)
        q, named = arrived.queries
        out, lse = read_arrived(cache.selection, step, query, q, arrived.tokens, named.bool(), view)
        partials = torch.cat([out, lse.unsqueeze(-1)], -1)
        what = f"returning partial attention of layer {query.layer}"
        out, lse = bring_back(cache.exchange, partials, sent.need[QUERIES], arrived, cache.map.rank_order, what)
        shape, count = query.q.shape[:2], source.num_tokens
        return Partial(out[:count].unflatten(0, shape), lse[:count].unflatten(0, shape), step.sees_own(source))

    def flush(self, step: Step) -> None:
        """The last layer has no later record to ride in: late entries go home in one collective of their own."""
        if step.late is not None:
            late, step.late = step.late, None
            self._send(step, None, late)
        if self.pages is not None:
            self.pages.end(step)

    def _open(self, query: Query) -> None:
        """Plan the forward. The headers of all ranks come before the first record, as its length depends on what they say."""
        cache, agreement, local = self.cache, self.cache.agreement, self.cache.local
        routes = None if self.pages is None else cache.selection.routes
        layout = Layout([("positions", (max(agreement.num_rows),), torch.int32), *([("behind", (1,), torch.int32)] if routes else [])])
        values = {"positions": local.positions.flatten()} if agreement.is_plain(local) else {}
        if routes is not None:
            values["behind"] = torch.tensor([routes.behind or cache.selection.watched], dtype=torch.int32).to(cache.device)
        block = layout.pack(agreement.header_there(local, cache.announced), values, cache.device)
        buffers = cache.exchange.all_gather(block, f"opening a forward at layer {query.layer}")
        headers = headers_of(buffers)
        if not agreement.all_plain(headers):
            cache.agree(headers, query.k)
            return
        fields = layout.unpack(buffers)
        cache.open(agreement.continue_plain(local, headers), [Announced.of(header) for header in headers])
        cache.step.set_positions(fields["positions"].reshape(-1))
        if routes is not None:
            routes.begin(cache.step, nobody_behind=not bool(fields["behind"].any()))

    def _gather(self, num_tokens: int, own: Tensor, what: str) -> Tensor:
        """int32 [n <= num_tokens] of every rank -> [G, num_tokens], -1 behind those of a rank."""
        cache, layout = self.cache, Layout([("own", (num_tokens,), torch.int32)])
        block = layout.pack(no_header(cache.device), {"own": own}, cache.device)
        return layout.unpack(cache.exchange.all_gather(block, what))["own"]

    def _send(self, step: Step, query: Query | None, due: Query | LateEntries | None) -> Sent:
        """Queries go to the ranks that they read, what is due goes home, and is stored there. query: None = nobody reads."""
        cache, source = self.cache, step.sources[step.own]
        valid = shard = placed = None
        if due is not None:
            ids = due.expert_ids
            ids = torch.full((source.num_tokens,), -1, device=cache.device) if ids is None else ids
            valid, shard, placed = self._place(step, due.layer, ids)
            if self.pages is None:
                tell_own(cache.selection, step, due.layer, due.k, valid, shard)
            else:
                self.pages.note(step, due.layer, valid, shard)
        nobody = Asked(torch.zeros(len(step.sources), 0, dtype=torch.bool, device=cache.device), [])
        asked = nobody if query is None else self._ask(step, query) if self.pages is None else self.pages.ask(step, query)
        need = torch.zeros(2, len(step.sources), step.num_tokens * asked.units, dtype=torch.bool, device=cache.device)
        need[QUERIES, :, : asked.ranks.shape[1]] = asked.ranks
        common, entries = [], []
        if due is not None:
            need[ENTRIES, :, : source.num_tokens] = cache.map.held.index_select(1, shard.clamp_min(0)) & valid
            common = [in_units(ids.to(torch.int32), asked.units)] if placed is None else []
            entries = [x for x in (due.k, due.v) if x.shape[-1]]
        what = f"routing layer {(query or due).layer}"
        arrived = route(cache.exchange, need, common, asked.fields, entries, what)
        if due is not None:
            self._store(step, due, placed, arrived, asked.units)
        return Sent(need, arrived, asked.units)

    def _store(self, step: Step, due: Query | LateEntries, placed: Placed | None, arrived: Arrived, units: int) -> None:
        """What has come home. placed: of all ranks' entries; None: their expert ids have come, too."""
        if placed is None:
            placed = self.homes.place(step, due.layer, from_units(arrived.common[0], len(step.sources), step.num_tokens, units).long())
        k, *v = arrived.entries
        v = v[0] if v else due.v.new_empty(arrived.entry_tokens.numel(), *due.v.shape[1:])
        tokens = token_of(arrived.entry_tokens, step.num_tokens, units)
        keys, written = self.homes.store(step, due.layer, placed, tokens, k, v)
        if self.pages is not None:  # pages are scored where they lie
            self.cache.selection.news.wrote(due.layer, step, keys, written)

    def _place(self, step: Step, layer: int, ids: Tensor) -> tuple[Tensor, Tensor, Placed | None]:
        """valid [n] and shard [n] of this rank's entries. Where entries may spill, where they go depends on those of all ranks, whose ids
        are gathered first; then also where all of them go."""
        if not step.may_spill[layer]:
            return *self.homes.place_own(step, layer, ids), None
        of_all = self._gather(step.num_tokens, ids.to(torch.int32), f"sharing the expert ids of layer {layer}, which may spill")
        placed = self.homes.place(step, layer, of_all.flatten().long())
        own = slice(step.own * step.num_tokens, step.own * step.num_tokens + ids.numel())
        return placed.valid[own], placed.shard[own], placed

    def _ask(self, step: Step, query: Query) -> Asked:
        """The shards that own queries read, and the ranks that they go to."""
        source, num_shards = step.sources[step.own], self.cache.map.num_shards
        if not source.num_tokens or not step.reads(source):
            nowhere = torch.zeros(max(num_shards, len(step.sources)), source.num_tokens, dtype=torch.bool, device=self.cache.device)
            named, ranks = nowhere[:num_shards].T, nowhere[: len(step.sources)]
        else:
            named, ranks = choose_ranks(self.cache.selection, step, query)
        self.cache.rebalancing.note_reads(named)
        return Asked(ranks, [query.q.flatten(0, 1), named.to(torch.uint8)])

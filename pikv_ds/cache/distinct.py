"""A step in which every rank brings requests of its own: one all-gather of the packed record, one all-to-all of (out, lse)."""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds.exchange.wire import HEADER, Layout, headers_of
from pikv_ds.ops import merge_partials
from pikv_ds.pages.events import Written
from pikv_ds.pages.view import Before
from pikv_ds.retention.attention import Waiting
from pikv_ds.selection.returns import return_needed
from pikv_ds.step.query import Partial, Query, Staged

from .reader import nothing
from .way import Core


class DistinctStep:
    """The way of a layer for distinct requests. Holds nothing of its own; works on the cache."""

    def __init__(self, cache: Core) -> None:
        self.cache = cache

    def attend(self, query: Query) -> Partial:
        cache = self.cache
        fields = self._open(query) if cache.plan is None else None
        if cache.agreement.mode == "replicated":  # the requests of the new generation are the same on all ranks
            return cache.replicated_way.attend(query)
        plan = cache.plan
        wanted = any(cache.reader.reads(plan, source) for source in plan.sources)
        watched = cache.reader.watcher(query.layer) is not None
        if fields is None:
            buffers, layout = self._share(query, plan.num_tokens, with_query=wanted or watched, send=True)
            fields = layout.unpack(buffers)
        if plan.positions is None:
            plan.set_positions(fields["positions"].reshape(-1))
        if "lse" in fields:
            self._observe(fields["lse"])
        before = cache.reader.before(plan, query.layer)
        written = self._store(query, fields)
        partial = self._answer(query, fields["q"], before) if wanted else nothing(query.q, query.v_dim)
        if watched:
            asked = Waiting(query.layer, query.scale, fields["q"], fields["k"], written.slot_mapping, partial.lse.flatten(0, 1))
            cache.waiting = asked
            if not wanted:
                self._observe(None)  # nothing is stored for anybody, which every rank knows
        return partial

    def _observe(self, lse: Tensor | None) -> None:
        """Show the policy the layer that waits. lse [G, N, Hq] of all ranks' queries."""
        cache = self.cache
        asked, cache.waiting = cache.waiting, None
        cache.reader.watcher(asked.layer).observe(asked, cache.plan, lse)

    def flush_watched(self) -> None:
        """The lse of the last layer that a policy watches, if no later record has carried it: one collective of its own."""
        cache = self.cache
        asked = cache.waiting
        if asked is None:
            return
        layout = Layout([("lse", (cache.plan.num_tokens, asked.lse.shape[1]), torch.float32)])
        header = torch.zeros(HEADER, dtype=torch.int32, device=cache.device)
        block = layout.pack(header, {"lse": asked.lse}, cache.device)
        self._observe(layout.unpack(cache.exchange.all_gather(block, "sharing the lse of the last layer"))["lse"])

    def flush_staged(self) -> None:
        """The last layer has no later record to ride in: one collective of its own."""
        cache = self.cache
        buffers, layout = self._share(None, cache.plan.num_tokens, with_query=False, send=True)
        self._append_staged(layout.unpack(buffers))
        cache.staged = None

    def _open(self, query: Query) -> dict[str, Tensor] | None:
        """Plan the forward. Returns the first record when it served, None when it must be sent again in the agreed size."""
        cache, agreement, local = self.cache, self.cache.agreement, self.cache.local
        plain = agreement.is_plain(local)
        buffers, layout = self._share(query, max(agreement.num_rows), with_query=True, send=plain)
        headers = headers_of(buffers)
        if not agreement.all_plain(headers):
            cache.settle(headers, query.k)
            return None
        cache.hold = agreement.any_hold(headers)
        cache.adopt(agreement.continue_plain(local, headers))
        return layout.unpack(buffers)

    def _share(self, query: Query | None, num_tokens: int, *, with_query: bool, send: bool) -> tuple[Tensor, Layout]:
        """First collective of a layer: [q | k | v | expert ids | positions] of every rank to every rank.

        With a policy that watches attention also the merged lse of the layer before. With staged ids the entries are those of that layer.
        send=False: the sizes that others expect, without content.
        """
        cache = self.cache
        positions = cache.local.positions.flatten()
        fields, values = [("positions", (num_tokens,), torch.int32)], {"positions": positions}
        if with_query:
            fields.append(("q", (num_tokens, *query.q.shape[2:]), query.q.dtype))
            values["q"] = query.q.flatten(0, 1)
        if cache.waiting is not None:
            fields.append(("lse", (num_tokens, cache.waiting.lse.shape[1]), torch.float32))
            values["lse"] = cache.waiting.lse
        entries = cache.staged if cache.stages else query
        if entries is not None:
            ids = entries.expert_ids if entries.expert_ids is not None else torch.full_like(positions, -1)
            for name, value in (("k", entries.k), ("v", entries.v), ("ids", ids.to(torch.int32))):
                fields.append((name, (num_tokens, *value.shape[1:]), value.dtype))
                values[name] = value
        layout = Layout(fields)
        header = torch.tensor(cache.agreement.header(cache.local, cache.hold), dtype=torch.int32).to(cache.device)
        what = "sending the last layer's entries home" if query is None else f"sharing layer {query.layer}"
        return cache.exchange.all_gather(layout.pack(header, values if send else {}, cache.device), what), layout

    def _store(self, query: Query, fields: dict[str, Tensor]) -> Written | None:
        cache = self.cache
        if cache.stages:
            if cache.staged is not None:
                self._append_staged(fields)
            cache.staged = Staged(query.layer, query.k, query.v)
            return None
        return cache.append(query.layer, *_entries(fields))

    def _append_staged(self, fields: dict[str, Tensor]) -> None:
        self.cache.append(self.cache.staged.layer, *_entries(fields))

    def _answer(self, query: Query, queries: Tensor, before: Before | None) -> Partial:
        """Attend for every rank's queries to the entries held here, send the partials back, merge those of this rank's own queries."""
        cache, plan, partials, readers = self.cache, self.cache.plan, [], []
        needed = cache.selection is not None and cache.selection.returns_needed(plan)
        for run in plan.same_shape_runs():
            first, num_rows, begin = run[0], sum(s.num_rows for s in run), plan.sources.index(run[0])
            q = queries[begin : begin + len(run), : first.num_tokens].reshape(num_rows, first.num_columns, *queries.shape[2:])
            out, lse = cache.reader.read(plan, query, q, first.row0, num_rows, before)
            partials.append(torch.cat([out, lse.unsqueeze(-1)], -1).flatten(0, 1))
            if needed and num_rows:
                readers.append(cache.selection.readers)
        sizes = [source.num_tokens for source in plan.sources]
        what = f"returning partial attention of layer {query.layer}"
        if needed:
            mine = return_needed(torch.cat(partials), torch.cat(readers, 1), sizes, cache.exchange, what)
        else:
            mine = cache.exchange.all_to_all(torch.cat(partials), sizes, what)
        outs, lses = cache.map.in_rank_order(mine).unflatten(1, query.q.shape[:2]).split([query.v_dim, 1], -1)
        out, lse = merge_partials(outs.contiguous(), lses.squeeze(-1).contiguous())
        T = query.q.shape[1]
        return Partial(out, lse, T == 1 and not cache.stages)


def _entries(fields: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """k, v, expert ids of all sources' tokens, [G * N, ...]."""
    return fields["k"].flatten(0, 1), fields["v"].flatten(0, 1), fields["ids"].reshape(-1).to(torch.int64)

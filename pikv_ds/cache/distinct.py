"""A step in which every rank brings requests of its own: one all-gather of the packed record, one all-to-all of (out, lse)."""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds import ops
from pikv_ds.exchange.wire import Layout, headers_of, no_header
from pikv_ds.pages.view import Before
from pikv_ds.selection.returns import return_needed
from pikv_ds.step.agreement import Announced
from pikv_ds.step.query import LateEntries, LateLse, PageLse, Partial, Query
from pikv_ds.step.step import Step

from .reader import nothing
from .way import Core


class DistinctWay:
    """The way of a layer for distinct requests. Holds nothing of its own; works on the cache and its step."""

    def __init__(self, cache: Core) -> None:
        self.cache = cache

    def attend(self, query: Query) -> Partial:
        cache = self.cache
        fields = self._open(query) if cache.step is None else None
        if cache.agreement.mode == "replicated":  # the requests of the new generation are the same on all ranks
            return cache.ways["replicated"].attend(query)
        step, shares = cache.step, cache.reader.shares(query.layer)
        wanted = any(step.reads(source) for source in step.sources)
        due = cache.writer.due(step, query)
        if fields is None:
            asked = query.q if wanted or shares is not None else None
            fields = self._share(step, due, asked, step.num_tokens, f"sharing layer {query.layer}")[1]
        if step.positions is None:
            step.set_positions(fields["positions"].reshape(-1))
        if "lse" in fields:
            self._observe(step, fields["lse"])
        before = cache.reader.before(step, query.layer)
        written = cache.writer.store(step, query, _of_all(due, fields))
        partial, page_lse = Partial(*nothing(query.q, query.v_dim)[:2], False, True), {}
        if wanted:
            partial, page_lse = self.answer(step, query, fields["q"], before)
        if shares is not None:
            step.late_lse = LateLse(
                query.layer, query.scale, fields["q"], fields["k"], written.slot_mapping, partial.lse.flatten(0, 1), page_lse
            )
            if not wanted:
                self._observe(step, None)  # nothing is stored for anybody, which every rank knows
        return partial

    def flush(self, step: Step) -> None:
        """The last layer has no later record to ride in: one collective of its own for late entries, and one for a late lse."""
        if step.late is not None:
            fields = self._share(step, step.late, None, step.num_tokens, "sending the last layer's entries home")[1]
            self.cache.writer.append(step, *_of_all(step.late, fields))
            step.late = None
        if step.late_lse is not None:
            self._flush_lse(step, step.late_lse)

    def _flush_lse(self, step: Step, asked: LateLse) -> None:
        cache = self.cache
        layout = Layout([("lse", (step.num_tokens, asked.lse.shape[1]), torch.float32)])
        block = layout.pack(no_header(cache.device), {"lse": asked.lse}, cache.device)
        self._observe(step, layout.unpack(cache.exchange.all_gather(block, "sharing the lse of the last layer"))["lse"])

    def _observe(self, step: Step, lse: Tensor | None) -> None:
        """Show the policy the layer that waits. lse [G, N, Hq] of all ranks' queries."""
        asked, step.late_lse = step.late_lse, None
        self.cache.reader.shares(asked.layer).observe(asked, step, lse)

    def _open(self, query: Query) -> dict[str, Tensor] | None:
        """Plan the forward. Returns the first record when it served, None when it must be sent again in the agreed size."""
        cache, agreement, local = self.cache, self.cache.agreement, self.cache.local
        plain, due = agreement.is_plain(local), None if cache.late_experts else query
        headers, fields = self._share(None, due, query.q, max(agreement.num_rows), f"sharing layer {query.layer}", send=plain)
        if not agreement.all_plain(headers):
            cache.agree(headers, query.k)
            return None
        cache.open(agreement.continue_plain(local, headers), [Announced.of(header) for header in headers])
        return fields

    def _share(
        self, step: Step | None, due: Query | LateEntries | None, q: Tensor | None, num_tokens: int, what: str, *, send: bool = True
    ) -> tuple[list[list[int]], dict[str, Tensor]]:
        """First collective of a layer: [q | k | v | expert ids | positions] of every rank to every rank.

        With a policy that watches attention also the merged lse of the layer before. With late experts the entries are those of that layer.
        step: None = the ranks have not agreed on it yet. send=False: the sizes that others expect, without content.
        Returns: the headers of all ranks, read only for a new step, and the fields [G, N, ...].
        """
        cache = self.cache
        positions = cache.local.positions.flatten()
        fields, values = [("positions", (num_tokens,), torch.int32)], {"positions": positions}
        if q is not None:
            fields.append(("q", (num_tokens, *q.shape[2:]), q.dtype))
            values["q"] = q.flatten(0, 1)
        late_lse = None if step is None else step.late_lse
        if late_lse is not None:
            fields.append(("lse", (num_tokens, late_lse.lse.shape[1]), torch.float32))
            values["lse"] = late_lse.lse
        if due is not None:
            ids = due.expert_ids if due.expert_ids is not None else torch.full_like(positions, -1)
            for name, value in (("k", due.k), ("v", due.v), ("ids", ids.to(torch.int32))):
                fields.append((name, (num_tokens, *value.shape[1:]), value.dtype))
                values[name] = value
        layout = Layout(fields)
        header = no_header(cache.device) if step is not None else cache.agreement.header_there(cache.local, cache.announced)
        buffers = cache.exchange.all_gather(layout.pack(header, values if send else {}, cache.device), what, read=step is None)
        return headers_of(buffers) if step is None else [], layout.unpack(buffers)

    def answer(self, step: Step, query: Query, queries: Tensor, before: Before | None) -> tuple[Partial, dict[int, PageLse]]:
        """Attend for every rank's queries to the entries held here, send the partials back, merge those of this rank's own queries."""
        cache, partials, readers, page_lse = self.cache, [], [], {}
        needed = cache.selection is not None and cache.selection.returns_needed(step)
        for run in step.same_shape_runs():
            first, num_rows, begin = run[0], sum(s.num_rows for s in run), step.sources.index(run[0])
            q = queries[begin : begin + len(run), : first.num_tokens].reshape(num_rows, first.num_columns, *queries.shape[2:])
            found = cache.reader.read(step, query, q, first.row0, num_rows, before)
            partials.append(torch.cat([found.out, found.lse.unsqueeze(-1)], -1).flatten(0, 1))
            page_lse[first.row0] = found.page_lse
            if needed and num_rows:
                readers.append(found.readers)
        sizes = [source.num_tokens for source in step.sources]
        what = f"returning partial attention of layer {query.layer}"
        if needed:
            mine = return_needed(torch.cat(partials), torch.cat(readers, 1), sizes, cache.exchange, what)
        elif cache.map.copied:
            mine = self._from_readers(torch.cat(partials), sizes, step.own, what)
        else:
            mine = cache.exchange.all_to_all(torch.cat(partials), sizes, what)
        outs, lses = cache.map.in_rank_order(mine).unflatten(1, query.q.shape[:2]).split([query.v_dim, 1], -1)
        out, lse = ops.merge(outs.contiguous(), lses.squeeze(-1).contiguous())
        return Partial(out, lse, step.sees_own(step.sources[step.own])), page_lse

    def _from_readers(self, partials: Tensor, sizes: list[int], own: int, what: str) -> Tensor:
        """Partials [M, Hq, Dv + 1] of all sources' queries to those that this rank has read for; [G, own M, Hq, Dv + 1], 0 and lse -inf of
        ranks that read nothing for this one, as it holds copies of their shards."""
        cache, ranks = self.cache, range(len(sizes))
        sent = [size if cache.map.serves(cache.map.rank, source) else 0 for source, size in enumerate(sizes)]
        come = [sizes[own] if cache.map.serves(rank, own) else 0 for rank in ranks]
        parts = [part for part, rows in zip(partials.split(sizes), sent, strict=True) if rows]
        got = cache.exchange.all_to_all_rows(torch.cat([partials[:0], *parts]), sent, come, what)
        whole = partials.new_zeros(len(sizes), sizes[own], *partials.shape[1:])
        whole[..., -1] = -torch.inf
        for rank, part in zip(ranks, got.split(come), strict=True):
            if len(part):
                whole[rank] = part
        return whole


def _of_all(due: Query | LateEntries | None, fields: dict[str, Tensor]) -> LateEntries | None:
    """What is due, of all sources' tokens: k, v and expert ids [G * N, ...]."""
    if due is None:
        return None
    k, v, ids = (fields[name].flatten(0, 1) for name in ("k", "v", "ids"))
    return LateEntries(due.layer, k, v, ids.to(torch.int64))

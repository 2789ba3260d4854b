"""A step in which every rank has the same tokens (or there is one rank): entries are stored once, partials meet in one collective."""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds import ops
from pikv_ds.exchange.wire import Layout, headers_of, no_header
from pikv_ds.pages.events import Written
from pikv_ds.retention.attention import Shares
from pikv_ds.selection.found import Found
from pikv_ds.step.query import LateLse, Partial, Query
from pikv_ds.step.step import Step

from .reader import nothing
from .way import Core


class ReplicatedWay:
    """The way of a layer for replicated and single-rank requests. Holds nothing of its own; works on the cache and its step."""

    def __init__(self, cache: Core) -> None:
        self.cache = cache

    def attend(self, query: Query) -> Partial:
        cache = self.cache
        unchecked = self._open(query) if cache.step is None else False
        if cache.agreement.mode == "distinct":  # the requests of the new generation differ between the ranks
            return cache.ways["distinct"].attend(query)
        step = cache.step
        if step.positions is None:
            step.set_positions(cache.local.positions.flatten())
        before = None if step.all_see_own else cache.reader.before(step, query.layer)
        written = cache.writer.store(step, query, cache.writer.due(step, query))
        source, shares = step.sources[0], cache.reader.shares(query.layer)
        if not (step.all_see_own or step.reads(source)):
            if shares is not None:
                self._show(shares, step, query, written, None, None)
            return Partial(*nothing(query.q, query.v_dim)[:2], False, True)
        found = cache.reader.read(step, query, query.q, source.row0, source.num_rows, before)
        out, lse = found.out, found.lse
        if cache.exchange.size > 1:
            out, lse = self._merge(out, lse, unchecked)
        if shares is not None:
            self._show(shares, step, query, written, found, lse)
        return Partial(out, lse, step.all_see_own)

    def flush(self, step: Step) -> None:
        if step.late is not None:
            late, step.late = step.late, None
            self.cache.writer.append(step, *late)

    @staticmethod
    def _show(shares: Shares, step: Step, query: Query, written: Written | None, found: Found | None, lse: Tensor | None) -> None:
        """Show a policy that asks for it what a layer's queries attended to; lse [B, T, Hq] merged over ranks, None = nothing stored."""
        q, k = query.q.flatten(0, 1).unsqueeze(0), query.k.unsqueeze(0)
        page_lse = {} if found is None else {step.sources[0].row0: found.page_lse}
        asked = LateLse(query.layer, query.scale, q, k, written.slot_mapping, None, page_lse)
        shares.observe(asked, step, None if lse is None else lse.flatten(0, 1).unsqueeze(0))

    def _open(self, query: Query) -> bool:
        """Plan the forward. Returns True when the other ranks' headers are still to be compared, in this layer's own collective."""
        cache, agreement, local = self.cache, self.cache.agreement, self.cache.local
        selects = cache.selection is not None
        if agreement.is_plain(local):
            if selects and cache.exchange.size > 1:
                # Choosing pages is a collective before that of the partials: the headers can't ride in the latter.
                agreement.check_replicated(self._answer(query, 0))
            cache.open(agreement.continue_plain(local), [cache.announced])
            return cache.exchange.size > 1 and not selects
        if cache.exchange.size == 1:
            cache.agree([agreement.header(local, cache.announced)], query.k)
            return False
        # Other ranks may be in plain decoding: answer their collective, then all see that this forward is not plain.
        headers = self._answer(query, 0 if selects else query.v_dim)
        if not agreement.all_fresh(headers):
            agreement.check_replicated(headers)
        cache.agree(headers, query.k)
        return False

    def _merge(self, out: Tensor, lse: Tensor, unchecked: bool) -> tuple[Tensor, Tensor]:
        outs, lses, headers = self._gather(out.flatten(0, 1), lse.flatten(0, 1), unchecked)
        if unchecked:
            self.cache.agreement.check_replicated(headers)
        return ops.merge(outs.unflatten(1, out.shape[:2]), lses.unflatten(1, out.shape[:2]))

    def _gather(self, out: Tensor, lse: Tensor, read_headers: bool) -> tuple[Tensor, Tensor, list[list[int]] | None]:
        """out [N, Hq, Dv] and lse [N, Hq] of every rank, by its first shard: all ranks merge the same numbers in the same order."""
        cache = self.cache
        header = cache.agreement.header_there(cache.local, cache.announced) if read_headers else no_header(cache.device)
        layout = Layout([("out", tuple(out.shape), torch.float32), ("lse", tuple(lse.shape), torch.float32)])
        block = layout.pack(header, {"out": out, "lse": lse}, cache.device)
        gathered = cache.exchange.all_gather(block, "merging partial attention", read=read_headers)
        outs, lses = (cache.map.in_rank_order(layout.unpack(gathered)[name]) for name in ("out", "lse"))
        return outs, lses, headers_of(gathered) if read_headers else None

    def _answer(self, query: Query, v_dim: int) -> list[list[int]]:
        """The headers of all ranks, gathered in the collective of plain decoding with values of v_dim; 0 = one without partials."""
        shape = (self.cache.agreement.num_rows[0], query.q.shape[2] if v_dim else 0)
        out, lse = (query.q.new_zeros(*shape, *width, dtype=torch.float32) for width in ((v_dim,), ()))
        return self._gather(out, lse, True)[2]

"""Where attention goes: the share of every query's attention that each page got, from the lse of pages and the merged lse.

R request rows, S local shards, T queries per row, Hq query heads, P pages of a layer's store, C columns of a block table, H head tables:
the kv heads when a page holds the entries of one head, else 1. Nothing here reads the device back. Window layers are not watched.

What is counted is pages, or single entries when these leave one by one ("by entry"): P is then the slots of all pages and C those of a
table, each as a page that holds one entry. The op returns no lse of entries, so the keys are read once more for it, in torch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pikv_ds import ops

from .entries import EntryLse
from .plan import StepPlan
from .policies.base import RetentionPolicy, Seen
from .reader import Stored
from .step import Query
from .store import LayerStore
from .tables import Tables

BLOCK_ELEMENTS = 1 << 22  # of the scores inside a chunk that are held at a time


class Mass:
    """Shows policies what the queries of each layer attend to. Between read() and observe() it keeps that layer's page lse.

    policies: the first may keep values per row; append others that keep values per page only.
    """

    def __init__(self, policy: RetentionPolicy, tables: Tables) -> None:
        self.policies, self.tables = [policy], tables
        # By pool of pages: what queries saw of it; H > 1: of the pages of each head's own table.
        self.page_lse: dict[LayerStore, PageLse | EntryLse] = {}
        self.time = 0  # query columns since the generation began
        self.rows: dict[int, dict[str, Tensor]] = {}  # layer -> what the policy keeps per row, [R, ...]

    def reset(self) -> None:
        self.time, self.rows = 0, {}

    def remap(self, parent: Tensor) -> None:
        """Row i continues row parent[i] [R'], -1 = a new row."""
        for values in self.rows.values():
            for name, x in values.items():
                old = x.index_select(0, parent.clamp_min(0))
                values[name] = torch.where((parent >= 0).view(-1, *[1] * (x.dim() - 1)), old, 0)

    def rows_by_head(self, layer: int, num_tables: int) -> dict[str, Tensor]:
        """The layer's row values; with H head tables as [R * H, ...], the query heads of each among them."""
        rows = self.rows.get(layer, {})
        if num_tables == 1:
            return rows
        return {
            name: x.unflatten(1, (num_tables, -1)).flatten(0, 1) if x.dim() > 1 else x.repeat_interleave(num_tables)
            for name, x in rows.items()
        }

    def read(self, store: LayerStore, q: Tensor, stored: Stored, scale: float) -> tuple[Tensor, Tensor]:
        """Attention of q [R, T, Hq, Dk] to the entries of its rows in one store: out [R, T, Hq, Dv] f32, lse [R, T, Hq] f32.

        Each query reads its pages by itself, which gives the lse of every page with it; only reading a long chunk costs more that way.
        """
        num_rows, num_queries = q.shape[:2]
        table, seqlens, tail_rows = stored.block_table, stored.seqlens, stored.tail_rows
        if num_queries > 1:
            table, seqlens = (_per_query(x, num_rows, num_queries) for x in (table, seqlens))
            tail_rows = None if tail_rows is None else _per_query(tail_rows, num_rows, num_queries)
        by_entry = self.tables.by_entry
        out, lse, page_lse = ops.decode(
            q.flatten(0, 1).contiguous(), store.pages, store.fmt, table, seqlens,
            scale=scale, with_page_lse=not by_entry, tail=stored.tail, tail_rows=tail_rows,
        )  # fmt: skip
        if not by_entry:
            self.page_lse[store] = PageLse(page_lse.view(num_rows, num_queries, -1, *page_lse.shape[1:]))
        elif any(policy.watches for policy in self.policies):
            self.page_lse[store] = EntryLse(store, q, stored, scale)
        return out.unflatten(0, (num_rows, num_queries)), lse.unflatten(0, (num_rows, num_queries))

    def observe(self, query: Query, plan: StepPlan, slots: Tensor, lse: Tensor | None) -> None:
        """Account for the queries of one layer, after their partials have been merged over the ranks.

        Args: slots [R * T * H] int32, where the new entries lie on this rank, -1 elsewhere; lse [R, T, Hq] over all stored entries, None if
            there were none. In a forward of one column they include the query's own entry.
        """
        page_lse, self.page_lse = self.page_lse, {}
        for policy in self.policies:
            self._observe(policy, page_lse, query, plan, slots, lse)

    def _observe(
        self,
        policy: RetentionPolicy,
        page_lse: dict[LayerStore, PageLse | EntryLse],
        query: Query,
        plan: StepPlan,
        slots: Tensor,
        lse: Tensor | None,
    ) -> None:
        includes_self = plan.decode
        pools, valid = self.tables.pools(query.layer), plan.valid.view(query.q.shape[:2])
        columns = torch.arange(valid.shape[1], device=valid.device).expand_as(valid)
        if not plan.all_valid and valid.shape[1] > 1:
            columns = valid.to(torch.int8).argsort(dim=-1, stable=True)  # padding first, then the queries of a row in their order
        columns = columns[:, -(policy.window or valid.shape[1]) :]
        positions, by_entry = torch.where(valid, plan.positions.view(valid.shape), -1), self.tables.by_entry
        evicted = self.tables.directory.evicted[query.layer].unflatten(-1, (-1, pools[0].heads)).sum(1)
        facts = [_Facts(store, by_entry, plan, evicted) for store in pools]
        step = max(1, BLOCK_ELEMENTS // (valid.numel() * query.q.shape[2]))
        time = self.time + valid.shape[1] - columns.shape[1]
        for begin in range(0, columns.shape[1], 1 if includes_self else step):
            block = columns[:, begin : begin + step]
            own, total = None, _take(lse, block)
            if not includes_self:
                own, total = _inside(query, positions, valid, block, total, pools[0].heads)
            for store, fact in zip(pools, facts, strict=True):
                share = torch.zeros(fact.nowhere + 1, block.shape[1], device=valid.device)
                if own is not None and store is pools[0]:  # new entries lie in the first pool
                    page = torch.where(slots >= 0, slots if by_entry else slots // store.page_size, fact.nowhere)
                    share.index_add_(0, page, own.flatten(0, 2))
                if store in page_lse:
                    share.index_add_(0, fact.table, _of_pages(page_lse[store].of(block), total, valid.gather(1, block), store.heads))
                if policy.page_values and store.num_pages:
                    values = {name: store.summaries[name].view(-1) for name in policy.page_values}
                    policy.observe(values, fact.seen(share[:-1], valid.gather(1, block), time + begin))
            if policy.observes_queries:
                policy.observe_queries(self._rows(query), query.scale * _take(query.q, block).float(), total, positions.gather(1, block))

    def _rows(self, query: Query) -> dict[str, Tensor]:
        num_rows, _, heads, dim = query.q.shape
        if query.layer not in self.rows:
            shapes = self.policies[0].row_values(heads, dim)
            self.rows[query.layer] = {name: torch.zeros(num_rows, *shape, device=query.q.device) for name, shape in shapes.items()}
        return self.rows[query.layer]


class PageLse(NamedTuple):
    """The lse of pages as the op returns it."""

    values: Tensor  # [R, T, S, Hq, C]

    def of(self, columns: Tensor) -> Tensor:
        """Of the queries in `columns` [R, b]."""
        return _take(self.values, columns)


class _Facts:
    """What a Seen says about rows, the same for all its blocks of queries. With a page per head, the heads of a row count as rows."""

    def __init__(self, store: LayerStore, by_entry: bool, plan: StepPlan, evicted: Tensor) -> None:
        """evicted: [R, H] int64."""
        table, heads, self.nowhere = store.block_table, store.heads, store.num_pages
        if by_entry:
            slot = torch.arange(store.page_size, device=table.device)
            table = torch.where(table.unsqueeze(-1) >= 0, table.unsqueeze(-1) * store.page_size + slot, -1).flatten(2)
            self.nowhere = store.num_pages * store.page_size
        self.table = torch.where(table >= 0, table, self.nowhere).view(-1).to(torch.int64)  # [R * S * H * C]
        num_rows = table.shape[0] * heads
        table = table.view(table.shape[0], -1, heads, table.shape[-1])
        rows = torch.arange(num_rows, device=table.device).view(-1, 1, heads, 1).expand_as(table).reshape(-1)
        nobody = torch.full((self.nowhere + 1,), -1, device=table.device)
        row = nobody.scatter_reduce_(0, self.table, rows, "amax")[:-1]
        self.row = torch.where(row >= 0, row, num_rows)
        self.entries = (plan.lens_after.unsqueeze(1) - evicted).flatten()
        self.page_size, self.heads = 1 if by_entry else store.page_size, heads

    def seen(self, share: Tensor, real: Tensor, time: int) -> Seen:
        real = real.repeat_interleave(self.heads, 0)
        return Seen(share=share, row=self.row, real=real, entries=self.entries, page_size=self.page_size, time=time)


def _inside(query: Query, positions: Tensor, valid: Tensor, block: Tensor, lse: Tensor | None, num_tables: int) -> tuple[Tensor, Tensor]:
    """Attention of a block of a chunk's queries to the chunk's own entries, which dense attention does not report.

    Args: positions, valid [R, T]; block [R, b] columns of the queries; lse [R, b, Hq] over stored entries, or None; num_tables: H.
    Returns: shares [R, T, H, b] f32, mean over the query heads of a table, and lse [R, b, Hq] over stored and own entries.
    """
    q, k = _take(query.q, block), query.k.view(*valid.shape, *query.k.shape[1:])
    score = query.scale * torch.einsum("rbhgd,rthd->rbhgt", q.float().unflatten(2, (k.shape[2], -1)), k.float()).flatten(2, 3)
    visible = valid.unsqueeze(1) & (positions.unsqueeze(1) <= positions.gather(1, block).unsqueeze(2))
    score = torch.where(visible.unsqueeze(2), score, -torch.inf)
    total = score.logsumexp(-1)
    total = total if lse is None else torch.logaddexp(total, lse)
    share = torch.where(visible.unsqueeze(2), torch.exp(score - total.unsqueeze(-1)), 0).unflatten(2, (num_tables, -1)).mean(3)
    return torch.where(valid.gather(1, block)[..., None, None], share, 0).permute(0, 3, 2, 1), total


def _of_pages(page_lse: Tensor, total: Tensor, real: Tensor, num_tables: int) -> Tensor:
    """[R, b, S, Hq, C] lse of pages and [R, b, Hq] of everything -> shares [R * S * H * C, b], mean over heads; real [R, b]."""
    share = torch.exp(page_lse - total[:, :, None, :, None])
    share = torch.where(torch.isneginf(page_lse) | ~real[:, :, None, None, None], 0, share)
    share = share.unflatten(3, (num_tables, -1)).mean(4)  # [R, b, S, H, C]
    return share.permute(0, 2, 3, 4, 1).flatten(0, 3)


def _take(x: Tensor | None, block: Tensor) -> Tensor | None:
    """Columns `block` [R, b] of x [R, T, ...]."""
    if x is None or x.shape[1] == 1:
        return x
    return x.gather(1, block.view(*block.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:]))


def _per_query(x: Tensor, num_rows: int, num_queries: int) -> Tensor:
    """[R * S, ...] of tables -> [R * T * S, ...]."""
    x = x.view(num_rows, 1, -1, *x.shape[1:]).expand(-1, num_queries, *[-1] * x.dim())
    return x.reshape(-1, *x.shape[3:]).contiguous()  # of one row, reshape returns a view without strides

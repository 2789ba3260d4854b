"""Attention to pages that hold coefficients of un-rotated keys: decode, rotate by the stored positions, attend. Plain torch.

Between the up-projection and the query stands a rotation that differs from entry to entry, so U can't be folded into q
(pikv_ds/codecs/maps.py): the keys of the pages that are read are put together again, and queries and whatever looks at keys meet these. R
rows, T queries per row, S local shards, N = R * S tables, H kv heads, K columns that are read, P entries of a page. X is H where every head
has pages of its own (a list per head, or tables per head), else 1.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from pikv_ds import ops
from pikv_ds.codecs.maps import Transform
from pikv_ds.codecs.rope import rotate

from .pool import PagePool
from .unrotated_boxes import page_boxes
from .view import PageView, Read

NUMBERS_AT_ONCE = 1 << 25  # f32 of keys, values and scores that are held for a block of queries


class Rebuilt(NamedTuple):
    """Entries of pages as queries meet them, 0 where there is none."""

    k: Tensor
    """[N, H, K, P, D] f32, rotated."""
    v: Tensor
    """[N, H, K, P, r] f32, coefficients: what values are mapped by is folded into the output."""
    held: Tensor
    """[N, X, K, P] bool: an entry."""
    at: Tensor
    """[N, X, K, P] int32, its position; anything where none is held."""


class UnrotatedReader:
    """The pages.view.PageReader of a pool of coefficients of un-rotated keys."""

    rebuilds, as_stored, table_per_head = True, False, False
    softcap: float | None = None
    """Scores are bounded by it (pages/capped.py)."""

    def __init__(self, pool: PagePool, maps: Transform) -> None:
        """maps: with inv_freq, the pool's own or those of every entry that reaches the cache."""
        self.pool, self.maps = pool, maps
        self.k_dim = maps.k.decode.shape[2]

    def rebuild(self, view: PageView, page_list: Tensor | None = None) -> Rebuilt:
        """The entries of the listed columns [N, 1 or H, K] int32 (-1 = none), or of all. Other pages are not read. Sync: none."""
        pool, table, page_size = self.pool, view.block_table, self.pool.page_size
        columns = page_list
        if columns is None:
            columns = torch.arange(table.shape[2], device=table.device).expand_as(table)
        table, lens = table.expand(-1, columns.shape[1], -1), view.seqlens.unsqueeze(-1)
        page = table.gather(2, columns.clamp_min(0).to(torch.int64)).clamp_min(0)  # [N, X, K]
        offset = torch.arange(page_size, device=table.device)
        slot = columns.unsqueeze(-1) * page_size + offset  # [N, X, K, P]
        held = (columns >= 0).unsqueeze(-1) & (slot < lens.unsqueeze(-1))
        c, v = self._coefficients(page)
        if view.tail is not None:
            raw = view.tail.index_select(0, view.tail_rows.flatten()).float()
            raw = raw.view(table.shape[0], c.shape[1], *raw.shape[2:])[:, :, offset % pool.fmt.group]  # [N, H, P, r]
            is_open = held & (slot >= (lens - lens % pool.fmt.group).unsqueeze(-1))
            c = torch.where(is_open.unsqueeze(-1), raw.unsqueeze(2), c)
        # What is not held must be finite: a weight of 0 times NaN would still be NaN.
        c, v = (torch.where(held.unsqueeze(-1), x, 0) for x in (c, v))
        at = pool.positions[page]
        return Rebuilt(torch.where(held.unsqueeze(-1), self._keys(c, at), 0), v, held, at)

    def attend(self, q: Tensor, view: PageView, *, scale: float, window: int | None = None, q_positions: Tensor | None = None) -> Read:
        """One table for all heads. out [R, T, Hq, r] are coefficients of values; the lse is complete.

        Cost: all entries of the rows, H * (D + r) f32 numbers each, at a time.
        """
        read, num_rows = self.rebuild(view), q.shape[0]
        k, v = (x.unflatten(0, (num_rows, -1)).transpose(1, 2).flatten(2, 4) for x in (read.k, read.v))  # [R, H, S * K * P, D]
        mask = read.held.view(num_rows, 1, 1, -1)
        if window is not None:
            mask = mask & (read.at.view(mask.shape) > q_positions[:, None, :, None] - window)
        out, lse = ops.sdpa_lse(q.float().transpose(1, 2), k, v, scale=scale, mask=mask, softcap=self.softcap)
        return Read(out.transpose(1, 2), lse.transpose(1, 2))

    def attend_pages(
        self,
        q: Tensor,
        view: PageView,
        *,
        scale: float,
        page_list: Tensor | None = None,
        window: int | None = None,
        q_positions: Tensor | None = None,
    ) -> Read:
        """T queries that read the same tables: keys are put together once for all of them."""
        read, (num_rows, num_queries, num_q_heads, _) = self.rebuild(view, page_list), q.shape
        k, v = (x.unflatten(0, (num_rows, -1)) for x in (read.k, read.v))  # [R, S, H, K, P, D]
        held, at = (x.unflatten(0, (num_rows, -1)).transpose(1, 2)[:, None, :, None] for x in (read.held, read.at))  # [R, 1, X, 1, S, K, P]
        q, parts = q.float().unflatten(2, (k.shape[2], -1)), []
        step = max(1, NUMBERS_AT_ONCE // max(1, read.held[:, 0].numel() * num_q_heads))
        for begin in range(0, num_queries, step):
            logits = scale * torch.einsum("rthgd,rshcpd->rthgscp", q[:, begin : begin + step], k)
            if self.softcap is not None:
                logits = self.softcap * torch.tanh(logits / self.softcap)
            visible = held
            if window is not None:
                visible = held & (at > q_positions[:, begin : begin + step].view(num_rows, -1, *[1] * 5) - window)
            logits = torch.where(visible, logits, -torch.inf)
            lse = logits.flatten(4).logsumexp(-1)
            weights = torch.exp(logits - lse.clamp_min(torch.finfo(torch.float32).min)[..., None, None, None])
            out = torch.einsum("rthgscp,rshcpv->rthgv", weights, v)
            parts.append((out.flatten(2, 3), lse.flatten(2, 3), logits.logsumexp(-1).movedim(4, 2).flatten(3, 4)))
        return Read(*(parts[0] if len(parts) == 1 else (torch.cat(pieces, 1) for pieces in zip(*parts, strict=True))))

    def attend_listed(
        self,
        q: Tensor,
        view: PageView,
        page_list: Tensor | None,
        *,
        scale: float,
        window: int | None = None,
        q_positions: Tensor | None = None,
        page_lse: bool = False,
        block_size: int = 0,
    ) -> Read:
        """In torch, and only of the listed pages.

        Cost: as many f32 numbers as are read, for so many queries at a time that they are NUMBERS_AT_ONCE or of one query.
        """
        pool = self.pool
        assert block_size in (0, pool.page_size), (
            f"blocks of {block_size} of pages whose keys are rebuilt: refuse them (blueprint/blocks.py)"
        )
        num_tables, columns = view.block_table.shape[0], (view.block_table if page_list is None else page_list).shape[2]
        if not pool.num_pages:
            empty = q.new_zeros(*q.shape[:2], pool.fmt.v_dim, dtype=torch.float32)
            lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float32, device=q.device)
            return Read(empty, lse, lse.new_full((num_tables, q.shape[1], columns), -torch.inf) if page_lse else None)
        shards = num_tables // q.shape[0]
        numbers = shards * columns * pool.page_size * (pool.fmt.num_kv_heads * (self.k_dim + pool.fmt.v_dim) + 2 * q.shape[1])
        step, parts = max(1, NUMBERS_AT_ONCE // max(1, numbers)), []
        for begin in range(0, q.shape[0], step):
            queries, tables = slice(begin, begin + step), slice(begin * shards, (begin + step) * shards)
            part = PageView(*(x[tables] for x in view[:2]), view.tail, None if view.tail_rows is None else view.tail_rows[tables])
            read = self.attend_pages(
                q[queries].unsqueeze(1), part, scale=scale, page_list=None if page_list is None else page_list[tables], window=window,
                q_positions=None if q_positions is None else q_positions[queries].unsqueeze(1),
            )  # fmt: skip
            parts.append((read.out.squeeze(1), read.lse.squeeze(1), read.page_lse.flatten(0, 2)))
        out, lse, of_pages = parts[0] if len(parts) == 1 else (torch.cat(pieces) for pieces in zip(*parts, strict=True))
        return Read(out, lse, of_pages if page_lse else None)

    def met(self, k: Tensor, positions: Tensor) -> Tensor:
        return self.maps.keys(k, positions)

    def entries(self, table: Tensor, counts: Tensor, tail_rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys and values of the model, put together from what the pages hold."""
        heads, num_tables = self.pool.table.heads, table.shape[1]
        by_shard = lambda x: x.unflatten(0, (-1, heads)).transpose(1, 2).flatten(0, 1)  # noqa: E731  [R, S, ...] -> [R / H * S, H, ...]
        tail = None if tail_rows is None else self.pool.tail
        read = self.rebuild(PageView(by_shard(table), by_shard(counts), tail, None if tail is None else by_shard(tail_rows)))
        k, v = (x.flatten(2, 3) for x in (read.k, self._values(read.v)))  # [R / H * S, all kv heads, L, D]
        if heads == 1:
            return k, v
        return tuple(x.unflatten(0, (-1, num_tables)).transpose(1, 2).flatten(0, 2).unsqueeze(1) for x in (k, v))

    def bounds_shape(self, dtype: torch.dtype) -> tuple[int, int, int]:
        return ops.bounds_shape(self.pool.fmt, dtype, self.k_dim)

    def bounds(self, out: Tensor, slot_mapping: Tensor, table: Tensor) -> None:
        page_boxes(out, self.pool, self.rebuild, slot_mapping, table)

    def _keys(self, c: Tensor, at: Tensor) -> Tensor:
        """c [N, H, K, P, r] as pages hold them, at positions [N, X, K, P], as queries meet them: [N, H, K, P, D]."""
        k = self.maps.k.invert(c.movedim(1, -2))  # [N, K, P, H, D]
        return rotate(k.unsqueeze(-2), at.movedim(1, -1), self.maps.inv_freq).squeeze(-2).movedim(-2, 1)

    def _values(self, v: Tensor) -> Tensor:
        """[N, H, K, P, r] as pages hold them -> [N, H, K, P, Dv] as the model gave them."""
        return self.maps.v.invert(v.movedim(1, -2)).movedim(-2, 1)

    def _coefficients(self, page: Tensor) -> tuple[Tensor, Tensor]:
        """c_k and c_v [N, H, K, P, r] f32 of the pages [N, X, K] as the records hold them."""
        pool, fmt, heads = self.pool, self.pool.fmt, page.shape[1]
        if heads > 1 and fmt.num_kv_heads > 1:  # a list per head: of each page the section of that head alone
            sections = pool.pages[:, : fmt.positions_offset].unflatten(1, (heads, -1))
            own = sections[page, torch.arange(heads, device=page.device).unsqueeze(-1)].flatten(0, 2)
            fmt = replace(fmt, num_kv_heads=1)
            records = torch.nn.functional.pad(own, (0, fmt.record_bytes - own.shape[1]))
        else:
            records = pool.pages.index_select(0, page.flatten())
        return tuple(x.unflatten(0, page.shape).transpose(2, 3).flatten(1, 2) for x in ops.decode_pages(records, fmt))

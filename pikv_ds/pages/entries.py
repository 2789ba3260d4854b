"""Single entries read back from pages: keys and values as attention sees them, and the lse of each entry.

N tables, C columns of a table, L = C * page_size slots of it, H kv heads of a page, R rows, T queries, S local shards, Hq query heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds import ops

from .pool import LayerStore
from .unrotated import rebuild
from .view import Stored


def decoded(store: LayerStore, table: Tensor, counts: Tensor, tail: Tensor | None) -> tuple[Tensor, Tensor]:
    """k [N, H, L, Dk] and v [N, H, L, Dv], f32, as pages hold them; anything in slots without an entry. Sync: none.

    Args: table [N, C] int32, -1 = no page; counts [N] entries of each; tail [N, H, group, Dk], their raw groups, None for a format without.
    """
    fmt, page = store.fmt, table.clamp_min(0).flatten()
    k, v = ops.decode_pages(store.pages.index_select(0, page), fmt)
    k, v = (x.unflatten(0, table.shape).transpose(1, 2).flatten(2, 3) for x in (k, v))  # [N, C, H, page_size, D] -> [N, H, L, D]
    if tail is not None:
        slot, open_at = torch.arange(k.shape[2], device=k.device), (counts - counts % fmt.group).unsqueeze(-1)
        raw = ((slot >= open_at) & (slot < counts.unsqueeze(-1)))[:, None, :, None]
        k = torch.where(raw, tail.float()[:, :, slot % fmt.group], k)
    return k, k[..., : fmt.v_dim] if fmt.latent else v


def read_back(store: LayerStore, table: Tensor, counts: Tensor, tail_rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """k [R * S, H, L, Dk] and v [R * S, H, L, Dv], f32, of tables [R, S, C] with counts [R, S]; anything where no entry is. Sync: none.

    As attention meets them; where pages hold coefficients of un-rotated keys, keys and values are what these stand for.

    Args: tail_rows [R, S] int64, the rows of store.tail; None = the keys of open groups do not matter. With a page per kv head the heads of
        a request are rows, and H is 1.
    """
    tail = None if tail_rows is None else store.tail
    if store.turned is None:
        tail = None if tail is None else tail[tail_rows.flatten()]
        return decoded(store, table.flatten(0, 1), counts.flatten(), tail)
    shape, heads = (-1, store.heads, table.shape[1]), store.heads
    by_table = lambda x: x.unflatten(0, shape[:2]).transpose(1, 2).flatten(0, 1)  # noqa: E731  [R, S, ...] -> [R / heads * S, heads, ...]
    stored = Stored(by_table(table), by_table(counts), tail, None if tail is None else by_table(tail_rows))
    read = rebuild(store, stored)
    v = store.turned.v.invert(read.v.movedim(1, -2)).movedim(-2, 1)
    k, v = (x.flatten(2, 3) for x in (read.k, v))  # [R / heads * S, all kv heads, L, D]
    if heads == 1:
        return k, v
    return tuple(x.unflatten(0, (-1, table.shape[1])).transpose(1, 2).flatten(0, 2).unsqueeze(1) for x in (k, v))


def keys_at(store: LayerStore, table: Tensor, index: Tensor) -> Tensor:
    """[n, H, Dk] f32, as pages hold them: keys of the entries `index` [n] of tables `table` [n] (row * tables of a row + table, ascending).

    Host phase.
    """
    tables, of = torch.unique_consecutive(table, return_inverse=True)
    tail = None if store.tail is None else store.tail[tables]
    k, _ = decoded(store, store.block_table.flatten(0, 1)[tables], store.counts.reshape(-1)[tables], tail)
    return k[of, :, index]


class PageLse:
    """The lse of pages as the op returns it."""

    def __init__(self, values: Tensor) -> None:
        """values [R, T, S, Hq, C], -inf where nothing was read."""
        self.values = values

    def __getitem__(self, rows: slice) -> PageLse:
        return PageLse(self.values[rows])

    def of(self, columns: Tensor) -> Tensor:
        """[R, b, S, Hq, C] of the queries in `columns` [R, b]."""
        if self.values.shape[1] == 1:
            return self.values
        return self.values.gather(1, columns[:, :, None, None, None].expand(-1, -1, *self.values.shape[2:]))


class EntryLse:
    """The logits of queries against every stored entry, made for some of the queries at a time: all of a long chunk's take much room."""

    def __init__(self, store: LayerStore, q: Tensor, stored: Stored, scale: float) -> None:
        """q [R, T, Hq, Dk]; stored: the tables of the R rows, as they were read."""
        self.q, self.scale = q, scale
        num_rows, table = q.shape[0], stored.block_table
        held = torch.arange(table.shape[-1] * store.page_size, device=q.device) < stored.seqlens.unsqueeze(-1)  # [R * S, tables, L]
        self.held = held.view(num_rows, 1, -1, table.shape[1], 1, held.shape[2])
        if store.turned is not None:
            self.k = rebuild(store, stored).k.flatten(2, 3).unflatten(0, (num_rows, -1))
            return
        tail = None if stored.tail is None else stored.tail[stored.tail_rows.flatten().long()]
        k = decoded(store, table.flatten(0, 1), stored.seqlens.flatten(), tail)[0]  # [R * S * tables, H of a page, L, Dk]
        self.k = k.view(num_rows, -1, table.shape[1] * k.shape[1], *k.shape[2:])  # [R, S, Hkv, L, Dk]

    def __getitem__(self, rows: slice) -> EntryLse:
        part = object.__new__(EntryLse)
        part.q, part.scale, part.k, part.held = self.q[rows], self.scale, self.k[rows], self.held[rows]
        return part

    def of(self, columns: Tensor) -> Tensor:
        """[R, b, S, Hq, L] f32, -inf where no entry is, of the queries in `columns` [R, b]. Sync: none."""
        q = self.q.gather(1, columns[:, :, None, None].expand(-1, -1, *self.q.shape[2:])).float().unflatten(2, (self.k.shape[2], -1))
        logits = self.scale * torch.einsum("rbhgd,rshld->rbshgl", q, self.k).flatten(3, 4)
        tables = self.held.shape[3]
        return torch.where(self.held, logits.unflatten(3, (tables, -1)), -torch.inf).flatten(3, 4)

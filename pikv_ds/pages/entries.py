"""Single entries read back from pages: keys and values as attention sees them.

N tables, C columns of a table, L = C * page_size slots of it, H kv heads of a page, R rows, S local shards.
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

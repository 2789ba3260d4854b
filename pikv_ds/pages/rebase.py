"""What is stored of a request, multiplied into another basis at the slots where it lies (tiers/bases.py). Host phase, between forwards.

N tables of the rows, C columns of a table, L slots of it, H kv heads, r width of a coefficient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds import ops

from .pool import PagePool


def rebase(pool: PagePool, rows: Tensor, by_k: Tensor, by_v: Tensor) -> None:
    """Multiply the coefficients of all entries of some rows: decode, multiply, encode again at the same slots. Host phase.

    Args: rows [n] int64, no page of which is another row's; by_k, by_v [n, H, r, r].
    """
    fmt, page_size, num_tables = pool.fmt, pool.page_size, pool.table.tables_per_row
    counts = pool.table.counts[rows].flatten()  # [N] tables
    pages = -(-int(counts.max()) // page_size)
    if pages == 0:
        return
    table = pool.table.ids[rows, :, :pages].flatten(0, 1)  # [N, C]
    ids = table.clamp_min(0).flatten()
    k, v = ops.decode_pages(pool.pages.index_select(0, ids), fmt)
    k, v = (x.transpose(1, 2).reshape(len(counts), -1, x.shape[1], x.shape[3]) for x in (k.float(), v.float()))  # [N, L, H, r]
    slot = torch.arange(k.shape[1], device=k.device)
    held = slot < counts.unsqueeze(1)
    tables = pool.table.numbers(rows)
    tail, tail_rows = pool.tail, tables
    if fmt.grouped and pool.full_pages:  # whole groups: their tails are filled and used up within the call
        shape = (len(counts), fmt.num_kv_heads, fmt.group, fmt.k_dim)
        tail, tail_rows = torch.zeros(shape, dtype=pool.tail.dtype, device=k.device), torch.arange(len(counts), device=k.device)
    elif fmt.grouped:
        raw = pool.tail[tables][:, :, slot % fmt.group].transpose(1, 2).float()
        k = torch.where((slot >= (counts - counts % fmt.group).unsqueeze(1))[:, :, None, None], raw, k)
    # A page holds all heads of a shard, or one head with tables shard * heads + head.
    each = lambda by: by.unsqueeze(1).expand(-1, num_tables // pool.table.heads, -1, -1, -1).reshape(len(counts), -1, *by.shape[2:])  # noqa: E731
    k, v = (torch.einsum("nlhr,nhrs->nlhs", x, each(by)) for x, by in ((k, by_k), (v, by_v)))
    k, v = (torch.where(held[:, :, None, None], x, 0) for x in (k, v))
    at = torch.where(held, table.repeat_interleave(page_size, 1) * page_size + slot % page_size, -1)
    ops.append(
        pool.pages, fmt, *(x.flatten(0, 1).to(pool.dtype).contiguous() for x in (k, v)), pool.positions[ids].flatten().contiguous(),
        at.flatten().to(torch.int32), tail=tail,
        tail_rows=tail_rows.repeat_interleave(k.shape[1]).to(torch.int32) if fmt.grouped else None,
    )  # fmt: skip

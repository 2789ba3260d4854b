"""Which near pages go far: the lowest by a policy's score, or the oldest; pages with first and latest tokens last. Host phase.

R request rows, S tables of a row, C columns of a table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .far import LayerTier
from .listing import Pages
from .pool import PagePool


def leaving(pool: PagePool, tier: LayerTier, count: int, at_once: int) -> Tensor:
    """[n] int64 near pages, count <= n <= at_once where there are so many full ones; pages that should stay are among the first `count`
    only. A page that several rows share goes by its highest score."""
    near = near_pages(pool, tier.num_near)
    if not near.table.shape[-1]:
        return torch.zeros(0, dtype=torch.int64)
    last = near.last_position
    score = last.to(torch.float32) if tier.score is None else tier.score(near)
    stays = (near.slot_positions[..., 0] < tier.sink_tokens) | (last >= (near.lens - tier.recent_tokens)[:, None, None])
    full = near.entries > 0
    ids = near.table[full].to(torch.int64)
    by_page = torch.full((tier.num_near,), -torch.inf).scatter_reduce_(0, ids, score[full], "amax")
    age = torch.full((tier.num_near,), -1).scatter_reduce_(0, ids, last[full].to(torch.int64), "amax")
    pinned = torch.zeros(tier.num_near, dtype=torch.int8).scatter_reduce_(0, ids, stays[full].to(torch.int8), "amax")
    ids = torch.unique(ids)
    for key in (age, by_page, pinned):  # stable sorts, the last key weighs most
        ids = ids[key[ids].argsort(stable=True)]
    spared = int((pinned[ids] == 0).sum())
    return ids[: max(count, min(at_once, spared))]


def near_pages(pool: PagePool, num_near: int) -> Pages:
    """The full near pages of all tables, closed up, as a policy sees pages."""
    table, size = pool.table, pool.page_size
    full = torch.arange(table.width, device=pool.device) < (table.counts // size).unsqueeze(-1)
    near = full & (table.ids < num_near)
    num = near.sum(-1)
    columns = int(num.max()) if num.numel() else 0
    order = (~near).to(torch.int8).argsort(dim=-1, stable=True)[..., :columns]
    last = torch.where(full, pool.positions[:, -1][table.ids.clamp_min(0).long()], -1)
    lens = last.flatten(1).amax(1) + 1 if last.shape[-1] else torch.zeros(table.num_rows, dtype=torch.int64)
    held = torch.arange(columns) < num.unsqueeze(-1)
    ids = torch.where(held, table.ids.gather(-1, order), -1)
    return Pages(pool=pool, table=ids, counts=(num * size).to(torch.int32), lens=lens.to(torch.int64))

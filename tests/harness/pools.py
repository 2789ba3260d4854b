"""Pools whose payload names its source: k = position + 1000 * row + 100000 * shard, v = -k."""

import torch
from torch import Tensor

from pikv_ds import ops
from pikv_ds.codecs import CODECS
from pikv_ds.pages.pool import PagePool
from pikv_ds.pages.raw import RawReader
from pikv_ds.spec import LayerSpec

SPEC = LayerSpec(layer_idx=0, num_kv_heads=2, k_dim=16, v_dim=8)
Lists = dict[tuple[int, int], list[int]]  # (row, shard) -> positions


def make_pool(num_rows: int, num_shards: int, page_size: int, spec: LayerSpec = SPEC, codec: str = "none") -> PagePool:
    counts, free_top = torch.zeros(num_rows, num_shards, dtype=torch.int32), torch.zeros((), dtype=torch.int64)
    fmt = CODECS.build(codec).page_format(spec, page_size, torch.float32)
    return PagePool(fmt, torch.float32, counts, free_top, RawReader)


def stored(pool: PagePool, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """k [n, Hkv, Dk], v [n, Hkv, Dv] and positions [n] of a raw store at these slots."""
    k, v, positions = ops.views(pool.pages, pool.fmt)
    page, offset = slots.long() // pool.page_size, slots.long() % pool.page_size
    return k[page, :, offset], v[page, :, offset], positions[page, offset]


def payload(rows: Tensor, shards: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    name = (positions + 1000 * rows + 100000 * shards).to(torch.float32).view(-1, 1, 1)
    return name.expand(-1, SPEC.num_kv_heads, SPEC.k_dim), -name.expand(-1, SPEC.num_kv_heads, SPEC.v_dim)


def append(pool: PagePool, tokens: list[tuple[int, int, int, bool]], **flags) -> Tensor:
    """tokens (row, shard, position, here), rows ascending. Not-here tokens carry NaN. Reserves the most that they may need."""
    rows, shards, positions, here = (torch.tensor(side) for side in zip(*tokens, strict=True))
    k, v = payload(rows, shards, positions)
    k, v = (x.masked_fill(~here.view(-1, 1, 1), torch.nan) for x in (k, v))
    pool.reserve(int(pool.allocator.free_top), len(tokens), (int(pool.table.counts.max()) + len(tokens)) // pool.page_size + 1)
    flags = {"one_per_row": False, "may_open": True, "all_valid": bool(here.all()), **flags}
    one_list = pool.table.counts.shape[1] == 1
    return pool.append(rows, None if one_list else torch.where(here, shards, 77), here, positions.to(torch.int32), k, v, **flags)


def fill(pool: PagePool, lists: Lists) -> None:
    append(pool, [(row, shard, position, True) for (row, shard), positions in sorted(lists.items()) for position in positions])


def contents(pool: PagePool, origin: dict[int, int] | None = None) -> Lists:
    """What the tables say is stored; asserts that every slot holds what its place says. origin: row -> row that wrote the payload."""
    lists = {}
    for row in range(pool.table.counts.shape[0]):
        for shard in range(pool.table.counts.shape[1]):
            index = torch.arange(int(pool.table.counts[row, shard]))
            slots = pool.table.ids[row, shard][index // pool.page_size] * pool.page_size + index % pool.page_size
            k_stored, v_stored, positions = stored(pool, slots)
            positions = positions.to(torch.int64)
            k, v = payload(torch.tensor((origin or {}).get(row, row)), torch.tensor(shard), positions)
            assert torch.equal(k_stored, k) and torch.equal(v_stored, v), f"row {row}, shard {shard}"
            lists[row, shard] = positions.tolist()
    return lists

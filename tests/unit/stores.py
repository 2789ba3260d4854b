"""LayerStores whose payload names its source: k = position + 1000 * row + 100000 * shard, v = -k."""

import torch
from torch import Tensor

from pikv_ds import ops
from pikv_ds.codecs import CODECS
from pikv_ds.pages.pool import LayerStore
from pikv_ds.spec import LayerSpec

SPEC = LayerSpec(layer_idx=0, num_kv_heads=2, k_dim=16, v_dim=8)
Lists = dict[tuple[int, int], list[int]]  # (row, shard) -> positions


def make_store(num_rows: int, num_shards: int, page_size: int, spec: LayerSpec = SPEC, codec: str = "none") -> LayerStore:
    counts, free_top = torch.zeros(num_rows, num_shards, dtype=torch.int32), torch.zeros((), dtype=torch.int64)
    fmt = CODECS.build(codec).page_format(spec, page_size, torch.float32)
    return LayerStore(fmt, torch.float32, torch.device("cpu"), counts, free_top)


def stored(store: LayerStore, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """k [n, Hkv, Dk], v [n, Hkv, Dv] and positions [n] of a raw store at these slots."""
    k, v, positions = ops.views(store.pages, store.fmt)
    page, offset = slots.long() // store.page_size, slots.long() % store.page_size
    return k[page, :, offset], v[page, :, offset], positions[page, offset]


def payload(rows: Tensor, shards: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    name = (positions + 1000 * rows + 100000 * shards).to(torch.float32).view(-1, 1, 1)
    return name.expand(-1, SPEC.num_kv_heads, SPEC.k_dim), -name.expand(-1, SPEC.num_kv_heads, SPEC.v_dim)


def append(store: LayerStore, tokens: list[tuple[int, int, int, bool]], **flags) -> Tensor:
    """tokens (row, shard, position, here), rows ascending. Not-here tokens carry NaN. Reserves the most that they may need."""
    rows, shards, positions, here = (torch.tensor(side) for side in zip(*tokens, strict=True))
    k, v = payload(rows, shards, positions)
    k, v = (x.masked_fill(~here.view(-1, 1, 1), torch.nan) for x in (k, v))
    store.reserve(int(store.free_top), len(tokens), (int(store.counts.max()) + len(tokens)) // store.page_size + 1)
    flags = {"one_per_row": False, "may_open": True, "all_valid": bool(here.all()), **flags}
    one_list = store.counts.shape[1] == 1
    return store.append(rows, None if one_list else torch.where(here, shards, 77), here, positions.to(torch.int32), k, v, **flags)


def fill(store: LayerStore, lists: Lists) -> None:
    append(store, [(row, shard, position, True) for (row, shard), positions in sorted(lists.items()) for position in positions])


def contents(store: LayerStore, origin: dict[int, int] | None = None) -> Lists:
    """What the tables say is stored; asserts that every slot holds what its place says. origin: row -> row that wrote the payload."""
    lists = {}
    for row in range(store.counts.shape[0]):
        for shard in range(store.counts.shape[1]):
            index = torch.arange(int(store.counts[row, shard]))
            slots = store.block_table[row, shard][index // store.page_size] * store.page_size + index % store.page_size
            k_stored, v_stored, positions = stored(store, slots)
            positions = positions.to(torch.int64)
            k, v = payload(torch.tensor((origin or {}).get(row, row)), torch.tensor(shard), positions)
            assert torch.equal(k_stored, k) and torch.equal(v_stored, v), f"row {row}, shard {shard}"
            lists[row, shard] = positions.tolist()
    return lists

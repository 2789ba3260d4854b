"""The pages of one layer against lists: append, growth, shrinking; the payload names its source, torch.empty is NaN."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pikv_ds.cache.inspect import PoolProbe
from pikv_ds.pages.allocator import GROWTH
from pikv_ds.pages.recycle import fork
from pikv_ds.spec import LayerSpec
from tests.harness.invariants import check_pages
from tests.harness.pools import SPEC, append, contents, fill, make_pool, stored

pytestmark = pytest.mark.usefixtures("nan_filled_empty")


@settings(max_examples=40)
@given(st.data())
def test_append_equals_lists(data):
    num_rows, num_shards = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    pool = make_pool(num_rows, num_shards, data.draw(st.sampled_from([1, 2, 3, 8])))
    lists = {(r, s): [] for r in range(num_rows) for s in range(num_shards)}
    position = 0
    for _ in range(data.draw(st.integers(1, 4))):
        token = st.tuples(st.integers(0, num_rows - 1), st.integers(0, num_shards - 1), st.booleans())
        tokens = sorted(data.draw(st.lists(token, min_size=1, max_size=15)), key=lambda t: t[0])
        tokens = [(row, shard, position + i, here) for i, (row, shard, here) in enumerate(tokens)]
        position += len(tokens)
        slots = append(pool, tokens)
        for (row, shard, at, here), slot in zip(tokens, slots.tolist(), strict=True):
            assert (slot >= 0) == here
            if here:
                lists[row, shard].append(at)
                assert stored(pool, torch.tensor([slot]))[2].item() == at
        assert contents(pool) == lists
        check_pages(PoolProbe(pool), shrunk=False)


@pytest.mark.parametrize("page_size", [1, 3, 32], ids="page{}".format)
@pytest.mark.parametrize("num_shards", [1, 2], ids="S{}".format)
def test_one_token_per_row(num_shards, page_size):
    """Decode: some rows idle, pages opened only where the plan said that they may."""
    pool, lists = make_pool(3, num_shards, page_size), {(r, s): [] for r in range(3) for s in range(num_shards)}
    for step in range(3 * page_size + 2):
        tokens = [(row, (row + step) % num_shards, step, (row + step) % 3 > 0) for row in range(3)]
        opens = any(here and len(lists[row, shard]) % page_size == 0 for row, shard, _, here in tokens)
        append(pool, tokens, one_per_row=True, may_open=opens)
        for row, shard, at, here in tokens:
            lists[row, shard] += [at] * here
        assert contents(pool) == lists
        check_pages(PoolProbe(pool), shrunk=False)


def test_all_valid_and_nothing_to_open_give_the_same_slots():
    slots = []
    for may_open, all_valid in ((True, False), (False, True)):
        pool = make_pool(2, 1, 4)
        fill(pool, {(0, 0): [0, 1], (1, 0): [0]})
        slots.append(append(pool, [(0, 0, 2, True), (1, 0, 1, True)], one_per_row=True, may_open=may_open, all_valid=all_valid).tolist())
        assert contents(pool) == {(0, 0): [0, 1, 2], (1, 0): [0, 1]}
    assert slots[0] == slots[1]


def test_what_is_not_stored_here_leaves_no_trace():
    pool = make_pool(2, 2, 2)
    fill(pool, {(0, 0): [0, 1, 2], (1, 1): [0]})
    before = pool.pages.clone()
    table, counts = pool.table.ids.clone(), pool.table.counts.clone()
    slots = append(pool, [(0, 0, 7, False), (0, 1, 8, False), (1, 1, 9, False)])
    assert slots.tolist() == [-1, -1, -1]
    assert torch.equal(pool.pages[: before.shape[0]], before)
    assert torch.equal(pool.table.ids[..., : table.shape[-1]], table) and torch.equal(pool.table.counts, counts)
    assert int(pool.allocator.free_top) == 3, "reserve() sees to three free pages, and none was taken"
    check_pages(PoolProbe(pool), shrunk=False)


@pytest.mark.parametrize(("needed", "slab"), [(1, 4), (40, 40), (0, 0)], ids=["share", "needed", "none"])
def test_growth_is_by_slabs_of_a_thirty_second(needed, slab):
    pool = make_pool(1, 1, 2)
    pool.reserve(0, 128, 130)
    pool.allocator.free_top.zero_()
    pool.allocator.refcount[:128] = 1
    pool.table.ids[0, 0, :128] = torch.arange(128)
    pool.table.counts[0, 0] = 256
    pool.reserve(0, needed, 130)
    assert pool.num_pages == 128 + slab and int(pool.allocator.free_top) == slab
    check_pages(PoolProbe(pool), shrunk=False)


@pytest.mark.parametrize("freed", [[0], [0, 1, 2], [2, 5, 9], list(range(10))], ids=["first", "row", "scattered", "all"])
def test_shrink_moves_pages_into_the_holes(freed):
    pool = make_pool(10, 1, 2)
    fill(pool, {(row, 0): [0, 1, 2, 3] for row in range(10)})
    for row in freed:
        pool.allocator.refcount[pool.table.ids[row, 0, :2]] -= 1
        pool.table.ids[row] = -1
        pool.table.counts[row] = 0
    pool.allocator.recount(pool.table.ids[pool.table.ids >= 0])
    check_pages(PoolProbe(pool), shrunk=False)
    before = contents(pool)
    free = int(pool.allocator.free_top)
    left = pool.shrink(free)
    assert left == int(pool.allocator.free_top) == (free if free <= 1 + (pool.num_pages - free) // GROWTH else 0)
    assert contents(pool) == before
    check_pages(PoolProbe(pool))
    fill(pool, {(row, 0): [4] for row in range(10)})
    assert contents(pool) == {key: [*positions, 4] for key, positions in before.items()}


def test_a_little_free_space_is_kept_for_the_next_step():
    pool = make_pool(32, 1, 1)
    fill(pool, {(row, 0): [0, 1] for row in range(32)})
    pool.reserve(0, 3, 4)
    assert (pool.shrink(3), pool.num_pages) == (3, 67)  # 64 used: up to 1 + 64 // 32 pages may stay free
    pool.reserve(3, 4, 4)
    assert (pool.shrink(int(pool.allocator.free_top)), pool.num_pages) == (0, 64)


@pytest.mark.parametrize("codec", ["none", "int4"])
@pytest.mark.parametrize("latent", [False, True], ids=["kv", "latent"])
def test_bytes_are_those_of_the_storages(latent, codec):
    spec = LayerSpec(layer_idx=0, num_kv_heads=1, k_dim=24, v_dim=16, latent=True) if latent else SPEC
    pool = make_pool(2, 2, 64, spec, codec)
    pool.reserve(0, 5, 3)
    tails = 0 if codec == "none" else 4 * 64 * spec.num_kv_heads * spec.k_dim * 2  # fp16
    assert pool.nbytes == 5 * pool.fmt.record_bytes + tails
    assert codec == "int4" or pool.fmt.record_bytes == 64 * (4 + 4 * spec.values_per_token)
    assert pool.nbytes == sum(t.untyped_storage().nbytes() for t in (pool.pages, pool.tail) if t is not None)
    assert pool.metadata_nbytes == 4 * (pool.table.ids.numel() + 2 * (5 + 1))


def test_summaries_travel_with_their_pages():
    pool = make_pool(10, 1, 2)
    pool.add_summary("name", (3,), torch.int32)
    fill(pool, {(row, 0): [0, 1, 2, 3] for row in range(10)})
    table = pool.table.ids[:, 0, :2].long()
    names = torch.arange(60, dtype=torch.int32).view(10, 2, 3)
    pool.summaries["name"][table] = names
    for row in (1, 4, 5):
        pool.allocator.refcount[table[row]] -= 1
        pool.table.ids[row], pool.table.counts[row] = -1, 0
    pool.allocator.recount(pool.table.ids[pool.table.ids >= 0])
    pool.shrink(int(pool.allocator.free_top))
    kept = [0, 2, 3, 6, 7, 8, 9]
    assert torch.equal(pool.summaries["name"][pool.table.ids[kept, 0, :2].long()], names[kept])
    assert pool.nbytes == pool.pages.nbytes + 4 * 3 * pool.num_pages
    fork(pool, torch.tensor([0, 0]), torch.tensor([[3], [3]], dtype=torch.int32))  # both write to the second page: one is copied
    assert torch.equal(pool.summaries["name"][pool.table.ids[:, 0, :2].long()], names[[0, 0]])
    with pytest.raises(ValueError, match="already keeps a summary 'name'"):
        pool.add_summary("name", (), torch.int32)

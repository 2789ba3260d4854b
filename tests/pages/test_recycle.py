"""Pages that leave a window, rows that fork and are cut, open pages that are copied before two rows write to them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pikv_ds.cache.inspect import PoolProbe
from pikv_ds.pages.recycle import expire, fork
from tests.harness.invariants import check_pages, check_unshared
from tests.harness.pools import append, contents, fill, make_pool, stored

pytestmark = pytest.mark.usefixtures("nan_filled_empty")


@settings(max_examples=40)
@given(st.data())
def test_expire_drops_whole_leading_pages(data):
    page_size, window = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    lens = data.draw(st.lists(st.integers(0, 24), min_size=1, max_size=3))
    homes = [[data.draw(st.integers(0, 1)) for _ in range(n)] for n in lens]
    lists = {(row, s): [p for p, home in enumerate(rows) if home == s] for row, rows in enumerate(homes) for s in range(2)}
    pool = make_pool(len(lens), 2, page_size)
    if any(lens):
        fill(pool, lists)
    gone = 0
    for (row, _), positions in lists.items():
        while len(positions) >= page_size and positions[page_size - 1] <= lens[row] - window:
            del positions[:page_size]
            gone += page_size
    expired, leaves = expire(pool, torch.tensor(lens), torch.tensor(lens), window)
    assert expired == gone
    assert contents(pool) == lists
    last = lambda row: [p[page_size - 1] for (r, _), p in lists.items() if r == row and len(p) >= page_size]  # noqa: E731
    assert leaves.tolist() == [min([n, *last(row)]) + window for row, n in enumerate(lens)], "a page would leave before it is looked for"
    check_pages(PoolProbe(pool), shrunk=False)


@pytest.mark.parametrize(("length", "left"), [(10, 8), (11, 4), (14, 4), (15, 0)], ids=["sees-3", "sees-4", "sees-7", "sees-8"])
def test_expire_at_the_edge_of_the_window(length, left):
    """Pages of positions 0..3 and 4..7, window 8: the next query, at position `length`, sees length - 7 and up."""
    pool = make_pool(1, 1, 4)
    fill(pool, {(0, 0): list(range(8))})
    assert expire(pool, torch.tensor([length]), torch.tensor([length]), 8)[0] == 8 - left
    assert contents(pool) == {(0, 0): list(range(8 - left, 8))}


def test_a_shared_page_expires_for_one_row_only():
    pool = make_pool(1, 1, 2)
    fill(pool, {(0, 0): [0, 1, 2, 3]})
    fork(pool, torch.tensor([0, 0]), torch.tensor([[4], [4]], dtype=torch.int32))
    assert expire(pool, torch.tensor([9, 4]), torch.tensor([9, 4]), 6)[0] == 4
    assert contents(pool, {1: 0}) == {(0, 0): [], (1, 0): [0, 1, 2, 3]}
    assert pool.num_pages - int(pool.allocator.free_top) == 2
    check_pages(PoolProbe(pool), shrunk=False)
    assert expire(pool, torch.tensor([9, 9]), torch.tensor([9, 9]), 6)[0] == 4
    assert pool.num_pages == int(pool.allocator.free_top)
    check_pages(PoolProbe(pool), shrunk=False)


@settings(max_examples=40)
@given(st.data())
def test_fork_equals_cut_lists(data):
    """Chains of forks and crops, each followed by new entries in every row: no row sees another's."""
    page_size, num_rows = data.draw(st.integers(1, 4)), 2
    pool = make_pool(num_rows, 2, page_size)
    lists = {(row, s): list(range(data.draw(st.integers(1, 9)))) for row in range(num_rows) for s in range(2)}
    fill(pool, lists)
    for _ in range(3):
        parents = data.draw(st.lists(st.integers(-1, num_rows - 1), min_size=1, max_size=4))
        keep = {(i, s): data.draw(st.integers(0, len(lists[p, s]))) if p >= 0 else 0 for i, p in enumerate(parents) for s in range(2)}
        lists = {(i, s): lists[p, s][: keep[i, s]] if p >= 0 else [] for i, p in enumerate(parents) for s in range(2)}
        num_rows = len(parents)
        fork(pool, torch.tensor(parents), torch.tensor([[keep[i, s] for s in range(2)] for i in range(num_rows)], dtype=torch.int32))
        check_pages(PoolProbe(pool), shrunk=False)
        check_unshared(PoolProbe(pool))
        tokens = [(i, s, 10 * i + 100 * len(lists[i, s]), True) for i in range(num_rows) for s in range(2)]
        append(pool, tokens)
        for row, shard, position, _ in tokens:
            lists[row, shard].append(position)
        for (row, shard), positions in lists.items():
            index = torch.arange(len(positions))
            slots = pool.table.ids[row, shard][index // page_size] * page_size + index % page_size
            assert stored(pool, slots)[2].tolist() == positions
        check_pages(PoolProbe(pool), shrunk=False)


@pytest.mark.parametrize(
    ("parents", "counts", "copies"),
    [
        ([0, 0, 0], [6, 6, 6], 0),
        ([0, 0, 0], [7, 7, 7], 2),
        ([0, 0], [7, 5], 1),
        ([0, 0], [5, 5], 1),
        ([0, 0], [6, 5], 1),
        ([0], [5], 0),
    ],
    ids=["full-pages-only", "three-writers", "crop-into-shared", "both-cropped", "open-beside-full", "alone"],
)
def test_only_pages_that_two_rows_need_differently_are_copied(parents, counts, copies):
    pool = make_pool(1, 1, 3)
    fill(pool, {(0, 0): list(range(7))})
    fork(pool, torch.tensor(parents), torch.tensor(counts, dtype=torch.int32).unsqueeze(-1))
    named = pool.table.ids[pool.table.ids >= 0].unique().numel()
    assert named == -(-max(counts) // 3) + copies
    assert contents(pool, dict.fromkeys(range(3), 0)) == {(i, 0): list(range(n)) for i, n in enumerate(counts)}
    check_pages(PoolProbe(pool), shrunk=False)
    check_unshared(PoolProbe(pool))


def test_dropped_rows_give_their_pages_back():
    pool = make_pool(2, 1, 2)
    fill(pool, {(0, 0): [0, 1, 2], (1, 0): [0, 1, 2, 3, 4]})
    fork(pool, torch.tensor([0]), torch.tensor([[3]], dtype=torch.int32))
    assert pool.num_pages - int(pool.allocator.free_top) == 2
    fork(pool, torch.tensor([-1, -1]), torch.zeros(2, 1, dtype=torch.int32))
    assert pool.num_pages == int(pool.allocator.free_top) and contents(pool) == {(0, 0): [], (1, 0): []}
    check_pages(PoolProbe(pool), shrunk=False)

"""How much a shard may hold, and the bound on pages that a forward opens."""

from fractions import Fraction
from math import ceil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pikv_ds.codecs import CODECS
from pikv_ds.errors import CapacityError
from pikv_ds.pages.estimate import pikv_bytes
from pikv_ds.pages.sizing import default_capacity, held_pages, pages_to_open, shard_capacity
from tests.harness.driver import Driver, layer

LAYERS = [layer(0), layer(1, window=8), layer(2, window=1)]


@pytest.mark.parametrize(
    ("window", "lens", "num_shards", "capacity"),
    [
        (None, [100], 4, 28 + 16),
        (None, [100, 20, 0], 4, 33 + 16),
        (8, [100, 5], 4, 4 + 16),
        (1, [100], 4, 16),
        (None, [], 2, 16),
        (None, [7], 1, 8 + 16),
    ],
    ids=["one-row", "rows", "window", "window-of-one", "no-rows", "one-shard"],
)
def test_the_balanced_share_a_tenth_more_and_one_page(window, lens, num_shards, capacity):
    assert shard_capacity(LAYERS, window, lens, num_shards, 16, None) == capacity


def test_the_default_is_exact_where_floating_point_is_not():
    """In 588 of these cases the ceil of a product with 1.1 is one more."""
    for num_shards in range(1, 8):
        for tokens in range(5000):
            wanted = ceil(Fraction(11, 10) * Fraction(tokens, num_shards)) + 16
            assert default_capacity(tokens, num_shards, 16) == wanted, (tokens, num_shards)
            assert shard_capacity(LAYERS, None, [tokens], num_shards, 16, None) == wanted, (tokens, num_shards)


@pytest.mark.parametrize(("tokens", "num_shards", "fullest"), [(100, 2, 56), (50, 5, 12), (40, 4, 12), (90, 3, 34), (64, 2, 37)])
def test_a_store_fills_a_shard_to_what_is_estimated(tokens, num_shards, fullest):
    """All tokens name one expert: its shard takes them up to the default capacity, whose bytes `pikv plan` prints as the worst case."""
    driver = Driver([layer(0)], page_size=1, num_shards=num_shards)
    driver.skewed = True
    driver.prefill([tokens])
    store = driver.probe.near_pool(0)
    held = int(store.counts.max())
    worst = pikv_bytes(driver.layers, [tokens], ranks=num_shards, codec=CODECS.build("none"), page_size=1, dtype=torch.float32).worst
    assert held == fullest and held * store.fmt.record_bytes == worst


def test_a_fixed_capacity_holds_or_says_how_much_is_missing():
    assert shard_capacity(LAYERS, None, [21, 19], 4, 16, 10) == 10
    assert shard_capacity(LAYERS, 8, [1000, 1000], 2, 16, 7) == 7
    with pytest.raises(
        CapacityError, match=r"layer 0 must hold 41 entries, but pikv.storage.capacity_tokens = 10 x 4 shards is 40; raise .* at least 11"
    ):
        shard_capacity(LAYERS, None, [21, 20], 4, 16, 10)
    with pytest.raises(CapacityError, match=r"layer 1 must hold 14 entries"):
        shard_capacity(LAYERS, 8, [1000, 1000], 2, 16, 6)


@st.composite
def forwards(draw):
    """counts [R][S], the shard of every new token per row, page_size."""
    num_rows, num_shards = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    counts = [[draw(st.integers(0, 9)) for _ in range(num_shards)] for _ in range(num_rows)]
    homes = [draw(st.lists(st.integers(0, num_shards - 1), max_size=12)) for _ in range(num_rows)]
    return counts, homes, draw(st.integers(1, 5))


def opened(counts, homes, page_size: int) -> int:
    """Pages that these homes open."""
    pages = 0
    for of_row, new in zip(counts, homes, strict=True):
        for shard, count in enumerate(of_row):
            pages += -(-(count + new.count(shard)) // page_size) - -(-count // page_size)
    return pages


@given(forwards())
def test_no_forward_opens_more_pages_than_reserved(case):
    counts, homes, page_size = case
    new, taken = torch.tensor([len(row) for row in homes]), [sum(row.count(s) for row in homes) for s in range(len(counts[0]))]
    bounds = [pages_to_open(torch.tensor(counts), new, room, page_size) for room in (None, torch.tensor(taken), torch.tensor(taken) + 3)]
    assert all(opened(counts, homes, page_size) <= bound for bound in bounds)
    assert bounds[1] <= bounds[2] <= bounds[0], "more room, more pages"
    if len(counts[0]) == 1:
        assert bounds[0] == opened(counts, homes, page_size), "one shard: the bound is exact"


def test_a_row_can_start_a_page_in_every_shard_but_not_more_than_it_has_tokens():
    counts = torch.zeros(2, 4, dtype=torch.int64)
    assert pages_to_open(counts, torch.tensor([3, 0]), None, 8) == 3
    assert pages_to_open(counts, torch.tensor([20, 0]), None, 8) == 4 + 2
    assert pages_to_open(counts, torch.tensor([20, 20]), torch.tensor([0, 0, 1, -5]), 8) == 1


def test_what_a_budget_has_taken_out_needs_no_room():
    assert shard_capacity([layer(0)], None, [50, 30], 2, 4, None, evicted=20) == default_capacity(60, 2, 4)
    assert shard_capacity([layer(0)], None, [50, 30], 2, 4, 30, evicted=20) == 30
    with pytest.raises(CapacityError, match="must hold 61 entries"):
        shard_capacity([layer(0)], None, [50, 30], 2, 4, 30, evicted=19)


def test_rows_without_tokens_open_nothing():
    assert pages_to_open(torch.zeros(2, 2, dtype=torch.int64), torch.tensor([20, 0]), torch.tensor([5, 5]), 4) == 4


@pytest.mark.parametrize(
    ("window", "tokens", "rows", "shards", "heads", "capacity", "expected"),
    [
        (None, 10, 1, 1, 1, 100, (3, 3)),  # 10 entries and at most 3 empty slots
        (None, 10, 2, 2, 1, 100, (8, 3)),  # two tables of each row: 6 empty slots
        (None, 10, 2, 2, 1, 6, (6, 3)),  # a shard takes 6, and 3 slots of each row are empty
        (None, 10, 2, 2, 3, 6, (18, 3)),
        (6, 20, 1, 1, 1, 100, (3, 3)),  # 6 entries, the first page and the last partly empty
        (6, 4, 1, 1, 1, 100, (2, 2)),
        (6, 20, 1, 1, 1, 3, (2, 3)),
    ],
)
def test_most_pages_by_hand(window, tokens, rows, shards, heads, capacity, expected):
    spec = layer(0, window=window)
    assert held_pages(spec, tokens, rows=rows, shards=shards, heads=heads, page_size=4, capacity=capacity) == expected

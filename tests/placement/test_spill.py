"""Homes under a capacity, and the index of an entry in its list, against loops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pikv_ds.ops.reference.slots import entry_index
from pikv_ds.placement.spill import spill, water_fill
from tests import reference_cache


@st.composite
def crowded(draw):
    """(wanted, valid, load, capacity) with room for every valid token."""
    num_shards = draw(st.integers(1, 5))
    wanted = draw(st.lists(st.integers(0, num_shards - 1), min_size=1, max_size=24))
    valid = draw(st.lists(st.booleans(), min_size=len(wanted), max_size=len(wanted)))
    load = draw(st.lists(st.integers(0, 9), min_size=num_shards, max_size=num_shards))
    least = max(max(load), -(-(sum(load) + sum(valid)) // num_shards))
    return wanted, valid, load, draw(st.integers(least, least + 4))


@given(crowded())
def test_spill_equals_the_loop(case):
    wanted, valid, load, capacity = case
    got = spill(torch.tensor(wanted), torch.tensor(valid), torch.tensor(load), capacity)
    want, over = reference_cache.spill([w for w, real in zip(wanted, valid, strict=True) if real], load, capacity)
    assert got.shard[torch.tensor(valid)].tolist() == want
    real = [i for i, is_real in enumerate(valid) if is_real]
    assert got.spilled.nonzero().squeeze(-1).tolist() == [real[i] for i in over]
    final = torch.tensor(load) + torch.bincount(torch.tensor(want, dtype=torch.int64), minlength=len(load))
    assert int(final.max()) <= capacity


@given(crowded(), st.integers(0, 6))
def test_spill_over_full_shards_still_balances(case, overfull):
    """More than capacity allows in all (the caller checks that): every token still gets a shard, and loads end as level as they can."""
    wanted, valid, load, _ = case
    got = spill(torch.tensor(wanted), torch.tensor(valid), torch.tensor(load), overfull)
    want, _ = reference_cache.spill([w for w, real in zip(wanted, valid, strict=True) if real], load, overfull)
    assert got.shard[torch.tensor(valid)].tolist() == want


@pytest.mark.parametrize(
    ("wanted", "load", "capacity", "homes"),
    [
        ([0, 0, 0], [0, 0], 3, [0, 0, 0]),
        ([0, 0, 0], [0, 0], 2, [0, 0, 1]),
        ([0, 0, 0, 1], [2, 0, 0], 2, [1, 2, 2, 1]),  # the last token fits; shard 2 was lower than shard 1, so it gets two of the rest
        ([1, 0, 0, 0, 0], [0, 3, 3, 1], 3, [3, 0, 0, 0, 3]),
    ],
    ids=["fits", "one-over", "level-then-order", "full-home"],
)
def test_spill_by_hand(wanted, load, capacity, homes):
    got = spill(torch.tensor(wanted), torch.ones(len(wanted), dtype=torch.bool), torch.tensor(load), capacity)
    assert got.shard.tolist() == homes


def test_padding_takes_no_room():
    got = spill(torch.tensor([0, 0, 0]), torch.tensor([False, False, True]), torch.tensor([1, 0]), 2)
    assert got.shard[2] == 0 and not got.spilled.any()


@given(st.lists(st.integers(0, 12), min_size=1, max_size=6), st.integers(0, 40))
def test_water_fill_raises_the_lowest_one_at_a_time(load, amount):
    level = list(load)
    for _ in range(amount):
        lowest = min(range(len(load)), key=lambda s: (level[s], load[s], s))
        level[lowest] += 1
    got = water_fill(torch.tensor(load), torch.tensor(amount))
    assert (torch.tensor(load) + got).tolist() == level and int(got.sum()) == amount


@given(st.data())
def test_entry_index_counts_up_in_every_list(data):
    num_rows, num_shards = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    rows = sorted(data.draw(st.lists(st.integers(0, num_rows - 1), min_size=1, max_size=20)))
    columns = data.draw(st.lists(st.integers(0, num_shards - 1), min_size=len(rows), max_size=len(rows)))
    here = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    counts = [[data.draw(st.integers(0, 7)) for _ in range(num_shards)] for _ in range(num_rows)]
    column = None if num_shards == 1 else torch.tensor(columns)
    got = entry_index(torch.tensor(rows), column, torch.tensor(here), torch.tensor(counts))
    want = []
    for row, shard, stored in zip(rows, columns, here, strict=True):
        want.append(counts[row][shard] if stored else -1)
        counts[row][shard] += stored
    assert got.tolist() == want

"""Copies are of what a rank reads most, and homes are shared out by what is read there."""

import torch

from pikv_ds.placement.copies import loads_of_homes, with_copies

HOMES = [0, 0, 1, 1]


def test_every_rank_holds_copies_of_what_it_reads_most():
    reads = torch.tensor([[1.0, 1, 2, 9], [7, 3, 1, 1]], dtype=torch.float64)
    holders = with_copies(HOMES, reads, 1)
    assert {frozenset(ranks) for ranks in (holders[0], holders[3])} == {frozenset({0, 1})}
    assert holders[1] == (0,) and holders[2] == (1,)
    held = [sum(rank in ranks for ranks in holders) for rank in range(2)]
    assert held == [3, 3]


def test_no_copies_change_nothing_and_all_copies_hold_everything():
    reads = torch.ones(2, 4, dtype=torch.float64)
    assert with_copies(HOMES, reads, 0) == ((0,), (0,), (1,), (1,))
    assert all(set(ranks) == {0, 1} for ranks in with_copies(HOMES, reads, 2))


def test_homes_of_copies_even_out_what_is_read():
    loads = torch.tensor([10.0, 9, 1, 1], dtype=torch.float64)
    reads = loads.expand(2, -1)
    before = loads_of_homes(loads, [(home,) for home in HOMES], 2)
    after = loads_of_homes(loads, with_copies(HOMES, reads, 1), 2)
    assert before.tolist() == [19, 2] and float(after.max()) <= 12
    assert after.sum() == before.sum()

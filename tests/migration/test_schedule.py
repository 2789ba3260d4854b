"""Maps planned from loads, beside all maps there are."""

from itertools import permutations

import pytest
import torch

from pikv_ds.migration.schedule import planned

BLOCKS = [(0, 1), (2, 3)]


def peak(loads: list[float], holders) -> float:
    ranks = [sum(load for load, (home,) in zip(loads, holders, strict=True) if home == rank) for rank in (0, 1)]
    return max(ranks) / (sum(ranks) / 2)


@pytest.mark.parametrize("seed", range(20))
def test_the_best_map_of_four_shards_is_found(seed):
    loads = torch.rand(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).pow(3)
    every = [tuple((order.index(shard) // 2,) for shard in range(4)) for order in permutations(range(4))]
    best = min(peak(loads.tolist(), holders) for holders in every)
    now = peak(loads.tolist(), ((0,), (0,), (1,), (1,)))
    found = planned(loads, BLOCKS, 1.0)
    reached = now if found is None else peak(loads.tolist(), found)
    assert reached <= best * 1.02 + 1e-9 and reached <= now + 1e-12


def test_even_ranks_and_loads_that_nothing_evens_out_stay():
    assert planned(torch.tensor([3.0, 1.0, 2.0, 2.0], dtype=torch.float64), BLOCKS, 1.0) is None
    assert planned(torch.tensor([5.0, 1.0, 2.0, 2.0], dtype=torch.float64), BLOCKS, 1.5) is None
    assert planned(torch.zeros(4, dtype=torch.float64), BLOCKS, 1.0) is None
    assert planned(torch.tensor([9.0, 9.0], dtype=torch.float64), [(0,), (1,)], 1.0) is None
    assert planned(torch.tensor([9.0, 1.0], dtype=torch.float64), [(0,), (1,)], 1.0) is None  # one shard each

"""Dealing items to packs, parting copies and evening out, beside slow versions."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pikv_ds.placement.packing import deal, part
from pikv_ds.placement.swaps import even_out


def dealt_slowly(weights: list[float], num_packs: int, given: list[int]) -> list[int]:
    """The pack of every item: rounds in which every pack with a place, the lightest first, takes the heaviest item that is left."""
    pack_of, places = list(given), len(weights) // num_packs
    line = sorted((i for i, pack in enumerate(given) if pack < 0), key=lambda i: -weights[i])
    while line:
        load, room = [0.0] * num_packs, [places] * num_packs
        for i, pack in enumerate(pack_of):
            if pack >= 0:
                load[pack], room[pack] = load[pack] + weights[i], room[pack] - 1
        for pack in sorted((p for p in range(num_packs) if room[p]), key=lambda p: load[p]):
            if line:
                pack_of[line.pop(0)] = pack
    return pack_of


def drawn(seed: int, num_packs: int, places: int, copied: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Kinds and weights [3, M]; `copied` kinds have up to num_packs copies."""
    generator = torch.Generator().manual_seed(seed)
    num_items = num_packs * places
    kinds = torch.arange(num_items).repeat(3, 1)
    for layer in kinds:
        for kind in range(copied):
            first = int(torch.randint(num_items, (1,), generator=generator))
            layer[first : first + int(torch.randint(1, num_packs + 1, (1,), generator=generator))] = num_items + kind
    weights = torch.rand(3, num_items + copied, generator=generator, dtype=torch.float64).exp().gather(1, kinds)
    return kinds, weights


def packed(items: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return values.gather(1, items.flatten(1)).view_as(items)


def check(items: torch.Tensor, kinds: torch.Tensor) -> None:
    """Every item once, and copies on different packs."""
    assert torch.equal(items.flatten(1).sort(1).values, torch.arange(kinds.shape[1]).expand_as(kinds))
    assert not bool((packed(items, kinds).sort(2).values.diff(dim=2) == 0).any())


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(1, 6), st.sampled_from([0.0, 0.4, 0.9]))
def test_dealing_in_rounds_is_that_of_loops(seed, num_packs, places, kept):
    _, weights = drawn(seed, num_packs, places, 0)
    order = torch.randperm(weights.shape[1], generator=torch.Generator().manual_seed(seed))
    stays = torch.rand(weights.shape, generator=torch.Generator().manual_seed(seed)) < kept
    given = torch.where(stays, order % num_packs, -1)
    items = deal(weights, num_packs, given)
    for layer in range(3):
        pack_of = dealt_slowly(weights[layer].tolist(), num_packs, given[layer].tolist())
        expected = [[i for i, pack in enumerate(pack_of) if pack == one] for one in range(num_packs)]
        assert items[layer].tolist() == expected
    assert torch.equal(deal(weights, num_packs), deal(weights, num_packs, torch.full_like(given, -1)))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), st.integers(2, 9), st.integers(1, 9), st.integers(0, 3))
def test_copies_are_parted_and_stay_so_while_the_heaviest_pack_gets_lighter(seed, num_packs, places, copied):
    kinds, weights = drawn(seed, num_packs, places, copied)
    items = part(deal(weights, num_packs), kinds, weights)
    check(items, kinds)
    after = even_out(items, kinds, weights)
    check(after, kinds)
    before, peak = (packed(each, weights).sum(2).amax(1) for each in (items, after))
    assert bool((peak <= before + 1e-12).all())
    enough = before * 0.999
    near = even_out(items, kinds, weights, enough)
    check(near, kinds)
    assert bool((packed(near, weights).sum(2).amax(1) <= before + 1e-12).all())
    assert torch.equal(even_out(items, kinds, weights, before), items), "what is light enough stays"


@pytest.mark.parametrize("places", [2, 3, 4, 5])
def test_two_packs_end_as_even_as_can_be(places):
    _, weights = drawn(places, 2, places, 0)
    after = packed(even_out(deal(weights, 2), torch.arange(2 * places).repeat(3, 1), weights), weights).sum(2).amax(1)
    best = [min(max(sum(one), float(row.sum()) - sum(one)) for one in combinations(row.tolist(), places)) for row in weights]
    torch.testing.assert_close(after, torch.tensor(best, dtype=torch.float64), rtol=2e-5, atol=0)


def test_copies_that_no_pack_has_room_for_are_refused():
    kinds = torch.tensor([[0, 0, 0, 1]])
    with pytest.raises(ValueError, match="more copies"):
        part(torch.tensor([[[0, 1], [2, 3]]]), kinds, torch.ones(1, 4))

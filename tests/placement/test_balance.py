"""Plans: legal, as good as trying everything on small cases, near to the present, alike on every call."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pikv_ds.placement import balance as planner
from pikv_ds.placement.balance import balance
from pikv_ds.placement.packing import copies
from pikv_ds.placement.slots import blocks, holders, moved, peak_over_mean, rank_loads
from tests.balance.traces import KINDS, drawn


def check(slots: torch.Tensor, num_experts: int, num_ranks: int, num_slots: int) -> None:
    """Every expert is somewhere, every rank is full, in order."""
    assert slots.shape[1:] == (num_ranks, num_slots // num_ranks)
    assert bool((slots.diff(dim=2) >= 0).all())
    assert all(set(layer.flatten().tolist()) == set(range(num_experts)) for layer in slots)


@st.composite
def problems(draw):
    num_ranks, per_rank = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    num_slots = num_ranks * per_rank
    num_experts = draw(st.integers(max(per_rank, 1), num_slots))
    loads = draw(
        st.lists(
            st.lists(st.sampled_from([0, 0, 1, 2, 3, 5, 8, 40, 41]), min_size=num_experts, max_size=num_experts), min_size=1, max_size=3
        )
    )
    return torch.tensor(loads), num_ranks, num_slots


@settings(deadline=None, max_examples=60)
@given(problems(), st.integers(0, 2**31))
def test_any_plan_is_legal_and_so_is_the_next(problem, seed):
    loads, num_ranks, num_slots = problem
    slots = balance(loads, num_ranks, num_slots=num_slots)
    check(slots, loads.shape[1], num_ranks, num_slots)
    later = loads[:, torch.randperm(loads.shape[1], generator=torch.Generator().manual_seed(seed))]
    again = balance(later, num_ranks, num_slots=num_slots, present=slots)
    check(again, loads.shape[1], num_ranks, num_slots)
    free = balance(later, num_ranks, num_slots=num_slots)
    allowed = rank_loads(later, free).amax(1) * (1 + planner.SLACK)
    assert bool((rank_loads(later, again).amax(1) <= allowed + 1e-9).all()), "staying near costs no more than the slack"
    assert torch.equal(slots, balance(loads, num_ranks, num_slots=num_slots))


def lightest_peak(loads: list[float], num_ranks: int) -> float:
    """Of all ways to deal out experts evenly, without copies."""

    def deal(left: tuple[int, ...], size: int) -> float:
        if not left:
            return 0.0
        first, *others = left
        return min(
            max(loads[first] + sum(loads[i] for i in mates), deal(tuple(i for i in others if i not in mates), size))
            for mates in combinations(others, size - 1)
        )

    return deal(tuple(range(len(loads))), len(loads) // num_ranks)


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_near_to_the_best_of_all(num_ranks):
    generator = torch.Generator().manual_seed(num_ranks)
    loads = torch.exp(torch.randn(8, 12 if num_ranks != 2 else 10, generator=generator))
    best = torch.tensor([lightest_peak(row, num_ranks) for row in loads.tolist()])
    ratio = rank_loads(loads, balance(loads, num_ranks)).amax(1) / best
    assert ratio.max() < 1.06 and ratio.mean() < 1.006, (ratio.max(), ratio.mean())


def test_copies_make_the_heaviest_copy_as_light_as_can_be():
    weights = torch.tensor([[10.0, 3.0, 2.0, 1.0]])
    assert copies(weights, 7, 4).tolist() == [[4, 1, 1, 1]]
    assert copies(weights, 7, 3).tolist() == [[3, 2, 1, 1]]  # more would share a rank


@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_what_hosts_begin_with_gets_better_by_few_moves(kind):
    _, loads = drawn(kind, 6, 64)
    present = blocks(6, 64, 8)
    slots = balance(loads, 8, present=present)
    free = balance(loads, 8)
    assert bool((peak_over_mean(loads, slots) <= peak_over_mean(loads, free) * (1 + planner.SLACK) + 1e-9).all())
    assert bool((peak_over_mean(loads, slots) <= peak_over_mean(loads, present) + 1e-9).all())
    assert int(moved(present, slots, 64).sum()) <= int(moved(present, free, 64).sum()) // 2
    assert not bool(moved(slots, balance(loads, 8, present=slots), 64).any()), "a plan that is good already stays"


def test_copies_stay_within_the_node_of_their_group():
    _, loads = drawn(1, 4, 32)
    slots = balance(loads, 8, num_slots=48, num_nodes=2, num_groups=8)
    check(slots, 32, 8, 48)
    node_of_group = [{slot // 4 for slot in layer[node * 4 : node * 4 + 4].flatten().tolist()} for layer in slots for node in range(2)]
    assert all(len(groups) == 4 for groups in node_of_group)
    again = balance(loads, 8, num_slots=48, num_nodes=2, num_groups=8, present=slots)
    assert not bool(moved(slots, again, 32).any())


def test_a_rank_that_holds_an_expert_twice_holds_it_once():
    loads = torch.tensor([[6.0, 2.0, 4.0]])
    slots = torch.tensor([[[0, 0], [1, 2]]])
    assert rank_loads(loads, slots).tolist() == [[6.0, 6.0]]
    assert torch.equal(balance(loads, 2, num_slots=4), slots), "a copy would make it worse: 3 + 2 and 3 + 4"


def test_holders_name_every_copy_once():
    slots = torch.tensor([[[0, 1], [1, 2], [1, 3]]])
    assert holders(slots, 4).tolist() == [[[0, -1, -1], [0, 1, 2], [1, -1, -1], [2, -1, -1]]]
    assert moved(torch.tensor([[[0, 1], [1, 2], [2, 3]]]), slots, 4).nonzero().tolist() == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_slots": 7}, "multiple of 2"),
        ({"num_slots": 14}, "from 6 to 12"),
        ({"num_nodes": 3}, "must divide"),
        ({"num_groups": 4}, "must divide"),
        ({"present": torch.zeros(1, 3, 2, dtype=torch.int64)}, "present has shape"),
    ],
)
def test_what_can_not_be_planned_is_said(arguments, words):
    with pytest.raises(ValueError, match=words):
        balance(torch.ones(1, 6), 2, **arguments)


def test_loads_must_be_numbers():
    with pytest.raises(ValueError, match="finite"):
        balance(torch.tensor([[1.0, float("nan")]]), 2)

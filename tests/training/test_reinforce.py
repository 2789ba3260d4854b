"""The policy gradient against the gradient of the expected reward, every set counted."""

from itertools import permutations

import pytest
import torch

from pikv_ds.training.reinforce import Cost, draw_sets, log_probability, policy_loss

COST = Cost(ranks=0.3, tiers=0.2, shards=2, near=2)


def expected(score, wanted, size):
    """Expected reward of one choice, over all sets in all orders."""
    total = 0
    for one in permutations(range(score.shape[1]), size):
        sets = torch.tensor(one).view(1, 1, -1)
        reward = wanted[0, list(one)].sum() / wanted.sum() - float(COST.of(sets, score.shape[1]))
        total = total + log_probability(score, sets).exp()[0, 0] * reward
    return total


@pytest.mark.parametrize("size", [1, 2])
def test_the_estimate_is_the_gradient_of_the_expected_reward(size):
    draw = torch.Generator().manual_seed(0)
    score = torch.randn(1, 4, generator=draw, dtype=torch.float64, requires_grad=True)
    wanted = torch.rand(1, 4, generator=draw, dtype=torch.float64)
    (exact,) = torch.autograd.grad(-expected(score, wanted, size), score)
    loss, reward = policy_loss(score, wanted, size, 60_000, COST, draw)
    (estimate,) = torch.autograd.grad(loss, score)
    torch.testing.assert_close(estimate, exact, atol=0.004, rtol=0)
    assert float(reward) == pytest.approx(float(expected(score.detach(), wanted, size)), abs=0.005)


def test_probabilities_of_all_orders_sum_to_one():
    score = torch.randn(1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sets = torch.tensor(list(permutations(range(5), 3))).unsqueeze(1)
    assert float(log_probability(score, sets).exp().sum()) == pytest.approx(1)
    assert torch.autograd.gradcheck(lambda x: log_probability(x, sets[:7]), score.clone().requires_grad_())


def test_pages_that_may_not_be_chosen_are_not():
    score = torch.zeros(2, 6).index_fill_(1, torch.tensor([0, 4]), -1e30)
    sets = draw_sets(score, 3, 200, torch.Generator().manual_seed(2))
    assert set(sets.flatten().tolist()) == {1, 2, 3, 5}


def test_what_a_set_costs():
    sets = torch.tensor([[0, 2], [0, 1], [6, 7]])
    assert COST.of(sets, 8).tolist() == pytest.approx([0.2, 0.3 + 0.2, 0.3])

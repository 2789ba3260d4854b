"""A policy gradient for choices of pages: the paper's R_A says RL and gives no formula; this is REINFORCE with a leave-one-out baseline.

N choices (a query and a kv head each), C pages, M drawn sets of K pages.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a set of pages costs, in shares of the attention that there is to find.

    ranks * (shards with a page in the set - 1) / (shards - 1), page c in shard c mod shards; tiers * share of the set's pages that are not
    among the newest `near` pages.
    """

    ranks: float = 0.0
    tiers: float = 0.0
    shards: int = 4
    near: int = 32

    def of(self, sets: Tensor, count: int) -> Tensor:
        """sets [..., K] int64 pages of `count` -> [...]."""
        shard = torch.nn.functional.one_hot(sets % self.shards, self.shards).amax(-2).sum(-1)
        far = (sets < count - self.near).double().mean(-1)
        return self.ranks * (shard - 1) / max(self.shards - 1, 1) + self.tiers * far


def draw_sets(score: Tensor, size: int, count: int, generator: torch.Generator) -> Tensor:
    """score [N, C] -> [M = count, N, K = size] int64: pages drawn one after the other, each by the softmax of the rest."""
    uniform = torch.rand(count, *score.shape, generator=generator).to(score.device).clamp(1e-9, 1 - 1e-7)
    return (score.detach() - torch.log(-torch.log(uniform))).topk(size, -1).indices


def log_probability(score: Tensor, sets: Tensor) -> Tensor:
    """Of drawing sets [M, N, K] in that order from score [N, C] -> [M, N]."""
    taken = score.expand(len(sets), -1, -1).gather(-1, sets)
    left, total = score.expand(len(sets), -1, -1), 0
    for i in range(sets.shape[-1]):  # of a training step: K is small
        total = total + taken[..., i] - left.logsumexp(-1)
        left = left.scatter(-1, sets[..., i : i + 1], -1e30)
    return total


def policy_loss(score: Tensor, wanted: Tensor, size: int, count: int, cost: Cost, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Minus the expected reward of drawn sets, by its gradient; and the mean reward.

    score and wanted [N, C]: logits of pages, and the attention that they hold; a page that may not be chosen has a score below -1e29.
    reward = share of `wanted` in the set - cost; baseline of a set: the mean reward of the other sets of its query.
    """
    sets = draw_sets(score, size, count, generator)
    found = wanted.sum(-1).clamp_min(1e-9)
    reward = wanted.expand(count, -1, -1).gather(-1, sets).sum(-1) / found - cost.of(sets, score.shape[1])
    baseline = (reward.sum(0) - reward) / max(count - 1, 1)
    weight = found / found.mean()
    return -(weight * (reward - baseline) * log_probability(score, sets)).mean(), (weight * reward).mean()

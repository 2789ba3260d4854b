"""Which window a rank trains on, and what it draws: functions of seed and step, so that a fit that was killed goes on as it would have."""

from __future__ import annotations

import random

import torch


def window_at(seed: int, count: int, turn: int) -> int:
    """The window of turn 0, 1, ... among `count`: every window once before any comes again, in a new order each time."""
    epoch, place = divmod(turn, count)
    order = list(range(count))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return order[place]


def generator_at(seed: int, step: int, rank: int) -> torch.Generator:
    """On the CPU."""
    return torch.Generator().manual_seed(random.Random(f"{seed} {step} {rank}").getrandbits(60))

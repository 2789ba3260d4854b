"""Placement over memory tiers beside a search over a grid of shares."""

import itertools
import random

import pytest

from pikv_ds.launch.cli import main
from pikv_ds.tiers.plan import Tier, plan_tiers

GRID = 24


def step_of(shares, kv, layers, tiers, compute) -> float | None:
    """Seconds of a step, None when a tier does not hold its part."""
    flight = min(2, layers)
    for i, tier in enumerate(tiers):
        if kv * shares[i] + flight * kv * sum(shares[i + 1 :]) / layers > tier.capacity_bytes * (1 + 1e-9):
            return None
    links = [kv * sum(shares[i:]) / tier.bytes_per_s for i, tier in enumerate(tiers) if i]
    return max([kv / tiers[0].bytes_per_s + compute, *links])


@pytest.mark.parametrize("seed", range(40))
def test_no_placement_of_a_grid_is_faster(seed):
    rng = random.Random(seed)
    kv, layers, compute = rng.uniform(1, 20), rng.choice([1, 2, 4, 32]), rng.choice([0.0, 0.5])
    tiers = [
        Tier(name=name, capacity_bytes=kv * rng.uniform(0.05, 1.0), bytes_per_s=rng.uniform(0.2, 2) * scale)
        for name, scale in [("device", 100), ("host", 10), ("disk", 1)][: rng.choice([2, 3, 3])]
    ]
    legal = []
    for head in itertools.product(range(GRID + 1), repeat=len(tiers) - 1):
        if sum(head) <= GRID:
            shares = [n / GRID for n in (*head, GRID - sum(head))]
            seconds = step_of(shares, kv, layers, tiers, compute)
            if seconds is not None:
                legal.append((seconds, shares))
    try:
        plan = plan_tiers(kv, layers, tiers, compute_s=compute)
    except ValueError as error:
        assert "do not hold" in str(error) and not legal
        return
    own = step_of(plan.shares, kv, layers, tiers, compute)
    assert own == pytest.approx(plan.step_s) and sum(plan.shares) == pytest.approx(1) and min(plan.shares) >= 0
    for seconds, shares in legal:
        assert own <= seconds * (1 + 1e-9)
        assert plan.shares[0] >= shares[0] - 1e-9 and plan.shares[-1] <= shares[-1] + 1e-9, "an entry lies lower than it has to"


def test_a_cache_that_fits_stays_on_the_device():
    plan = plan_tiers(10.0, 4, [Tier(name="device", capacity_bytes=10, bytes_per_s=5), Tier(name="host", capacity_bytes=0, bytes_per_s=1)])
    assert plan.shares == (1.0, 0.0) and plan.seconds == (2.0, 0.0)


def test_command(capsys):
    """4 layers x 1,024 tokens of 2 x (32 + 32) numbers in bf16 and their positions: 1.0 MiB. A device of half of it."""
    assert main(["plan", "--context", "1024", "--ranks", "1", "--tiers", "device=0.0008@1000,host=1@10"]) == 0
    text = capsys.readouterr().out
    assert "FlexGen's placement" in text and '"flexgen", "budget_ratio": 0.' in text
    assert main(["plan", "--context", "1024", "--ranks", "1", "--tiers", "device=0.0001@1000"]) != 0
    assert "do not hold" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["plan", "--context", "8", "--ranks", "1", "--tiers", "device=1"])

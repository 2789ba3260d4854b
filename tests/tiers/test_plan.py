"""Placement over memory tiers beside a search over a grid of shares."""

import itertools
import json
import random

import pytest
import torch

from pikv_ds.launch.cli import main
from pikv_ds.tiers.plan import Tier, plan_tiers
from tests.harness.driver import Driver, layer

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
    for wrong in ("device=1", "device=1@-2", "disk=1@measure", "host=x@measure", "host=1@/tmp"):
        with pytest.raises(SystemExit):
            main(["plan", "--context", "8", "--ranks", "1", "--tiers", wrong])


def test_the_run_is_the_plan_with_bandwidths_measured_here(tmp_path, capsys):
    """The block that is printed builds tiers of the planned pages, and what does not fit near goes where the plan says."""
    given = f"device=0.0007@measure,host=0.0004@measure,disk=1@{tmp_path}"
    assert main(["plan", "--context", "1024", "--ranks", "1", "--tiers", given, "--json", str(tmp_path / "rows")]) == 0
    block = json.loads("{" + next(line for line in capsys.readouterr().out.splitlines() if line.startswith('"offload"')) + "}")["offload"]
    rows = {row["tier"]: row for row in json.loads((tmp_path / "rows").read_text())["rows"] if "tier" in row}
    assert all(row["measured"] and row["gb_per_s"] > 0.01 for row in rows.values()) and block["nvme_path"] == str(tmp_path)
    layers = [layer(i, num_kv_heads=2, dim=32) for i in range(4)]
    driver = Driver(layers, page_size=16, dtype=torch.bfloat16, offload=block | {"staging_mib": 0.2}, checks=[])
    sizes, page = driver.cache.offload.sizes, 4 * 16 * (2 * 64 * 2 + 4)
    for name, pages in (("device", sizes.num_near), ("host", sizes.num_host), ("disk", sizes.num_file)):
        assert 0 <= pages * page - rows[name]["tier_bytes"] < 2 * page + 2**30 / 1000, name
    assert min(sizes.num_near, sizes.num_file) > 2

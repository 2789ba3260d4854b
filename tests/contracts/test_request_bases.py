"""Every registered router and policy beside codec svd, whose bases change while requests grow: it follows them, or is refused.

Bases of all directions lose nothing and keep inner products. So what follows from these is chosen and kept as without a codec; only boxes
around keys (`bounds` and what builds on it, the policy `quest`) are others in another basis: tests/routers/test_rebased.py and
test_turned_retention.py hold these to what is stored.
"""

import pytest
import torch

from pikv_ds.errors import ConfigError
from pikv_ds.policies import POLICIES
from pikv_ds.routers import ROUTERS
from pikv_ds.routers.bounds import PageBounds
from tests.harness.checks import Dense
from tests.harness.driver import Driver, layer, ragged
from tests.harness.rebasing import svd
from tests.retention_blocks import needed
from tests.routing_blocks import placement, routing

ROUTED = [name for name, router in ROUTERS.items() if not (router.reads_all or router.reads_model_queries)]
EVICTING = [name for name, policy in POLICIES.items() if not (policy.keeps_all or policy.reads_model_queries)]
LAYERS = [layer(0, dim=16), layer(1, dim=16, window=24)]


def grow(driver: Driver) -> None:
    """Requests of 20 and 9 tokens that double at different times: in a chunk, while it is decoded, once more; then one is forked."""
    driver.prefill([20, 9])
    for mask in (ragged([7, 7]), ragged([14, 1]), *[ragged([1, 1])] * 5, ragged([40, 37]), ragged([1, 1])):
        driver.forward(mask)
    driver.select([1, 0, 0])
    for mask in (ragged([1, 1, 1]), ragged([90, 20, 3]), ragged([1, 1, 1])):
        driver.forward(mask)


@pytest.mark.parametrize("name", [name for name in ROUTED if not issubclass(ROUTERS.get(name), PageBounds)])
def test_a_router_chooses_as_without_a_codec(name, tmp_path):
    """k-means, means of shards, what the attention says, what asks nothing of a key."""
    chosen = []
    for codec in ({}, svd()):
        block = routing(name, tmp_path, layers=2, shards=4, query_width=64)
        driver, own = Driver(LAYERS, routing=block, num_shards=4, page_size=4, **placement(name), **codec), []
        driver.without(Dense)

        def look(asked, page_list, own=own):
            own.append(page_list[asked.positions.repeat_interleave(asked.visible.shape[1]) >= 0].sort(-1).values)

        driver.probe.on_choice(look)
        grow(driver)
        assert not codec or max(driver.probe.fitted_at) > 30, "no request was fitted again"
        chosen.append(own)
    assert len(chosen[0]) > 20 and all(torch.equal(plain, turned) for plain, turned in zip(*chosen, strict=True))


@pytest.mark.parametrize("name", [name for name in ROUTED if ROUTERS.get(name).budgeted])
def test_a_router_with_a_budget_of_everything_reads_everything(name, tmp_path):
    """Within rounding of the dense attention that Driver compares with: nothing is lost and nothing is read in another basis."""
    block = routing(name, tmp_path, layers=2, shards=3, query_width=64, budget_pages=100)
    driver = Driver(LAYERS, routing=block, num_shards=3, **placement(name), **svd())
    driver.tolerance = 1e-5
    grow(driver)


def kept(name: str, folder, codec: dict, **scheduling) -> tuple[list, list]:
    """Entries after every forward, and the outputs; requests double in chunks and while they are decoded."""
    own = needed(name, folder, layers=2, heads=2, width=32)
    block = {"method": name, "budget_tokens": 40, "sink_tokens": 2, "recent_tokens": 5} | own | scheduling
    shards = 1 if POLICIES.get(name).needs_one_shard else 2
    driver = Driver([layer(0, dim=16), layer(1, dim=16)], scheduling=block, page_size=2, num_shards=shards, placement="position", **codec)
    driver.without(Dense)
    driver.prefill([50, 16])
    entries, outputs = [[pool.held for pool in driver.probe.all_pools]], []
    for mask in (ragged([13, 9]), *[ragged([1, 1])] * 8, ragged([33, 50]), *[ragged([1, 1])] * 2):
        outputs += driver.forward(mask)
        entries.append([pool.held for pool in driver.probe.all_pools])
    if codec:
        assert min(driver.probe.fitted_at) >= 75, "every request was fitted again"
    return entries, outputs


CASES = [(name, POLICIES.get(name).needs_head_budget or "shared") for name in EVICTING if name != "quest"]
CASES += [("knorm", "uniform"), ("hazard_lru", "uniform"), ("h2o", "adaptive")]


@pytest.mark.parametrize(("name", "head_budget"), CASES)
def test_a_policy_keeps_the_entries_that_it_keeps_without_a_codec(name, head_budget, tmp_path):
    plain, outputs = kept(name, tmp_path, {}, head_budget=head_budget)
    turned, found = kept(name, tmp_path, svd(fit_tokens=200), head_budget=head_budget)
    assert plain == turned
    for (out, lse), (want, want_lse) in zip(found, outputs, strict=True):
        assert torch.allclose(out, want, atol=1e-5) and torch.allclose(lse, want_lse, atol=1e-5)


@pytest.mark.parametrize(
    "name", [name for registry in (ROUTERS, POLICIES) for name, method in registry.items() if method.reads_model_queries]
)
def test_what_needs_the_models_own_queries_is_refused(name, tmp_path):
    if name in ROUTERS.names():
        block = {"routing": routing(name, tmp_path, layers=2, shards=1, query_width=64)}
    else:
        block = {"scheduling": {"method": name, "budget_tokens": 100} | needed(name, tmp_path, layers=2, heads=2, width=32)}
    with pytest.raises(ConfigError, match=f"method = '{name}' with pikv.compression.method = 'svd': .* the model's own queries"):
        Driver([layer(0, dim=16), layer(1, dim=16)], **block, **svd())


def test_policies_that_keep_queries_name_them():
    """Else they would stay in an old basis: refused at construction, and no registered one is."""
    keeping = [policy for _, policy in POLICIES.items() if policy.observes_queries and not policy.reads_model_queries]
    assert keeping and all(policy.row_queries for policy in keeping)

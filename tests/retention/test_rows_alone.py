"""Every policy, router and tier: a row keeps and reads what it does alone, whatever it was forked from and whatever stands beside it."""

import pytest
import torch

from pikv_ds import bundled
from pikv_ds.policies import POLICIES
from pikv_ds.routers import ROUTERS
from tests.harness.driver import layer
from tests.harness.lone_rows import SCENES, Rows
from tests.long_form import LONG, short_or_long
from tests.retention_blocks import needed
from tests.routing_blocks import placement, routing

WHOLE, MIXED = [layer(0), layer(1)], [layer(0), layer(1, window=9), layer(2)]
ROOMY = {"capacity_tokens": 1000}  # no shard is ever full: where entries go does not depend on other requests
BUDGET = {"budget_tokens": 24, "sink_tokens": 2, "recent_tokens": 5}
EVICTING = [name for name, policy in POLICIES.items() if not policy.keeps_all]
READING = [name for name, router in ROUTERS.items() if not router.reads_all]
RAW = {"compression": {"method": "fp8_e4m3", "raw_recent_tokens": 8}}
TIERS = {
    "raw window": RAW,
    "raw window, h2o": {**RAW, "scheduling": {"method": "h2o", **BUDGET}},
    "raw window, bounds": {**RAW, "routing": {"method": "bounds", "budget_pages": 8, "sink_tokens": 2, "recent_tokens": 5}},
    "uniform heads": {"scheduling": {"method": "h2o", "head_budget": "uniform", **BUDGET}},
    "adaptive heads": {"scheduling": {"method": "tova", "head_budget": "adaptive", **BUDGET, "budget_tokens": 40}},
    "late entries": {
        "routing": {"method": "bounds", "budget_pages": 4, "sink_tokens": 2, "recent_tokens": 5},
        "storage": {"num_shards": 2, "expert_ids": "true"},
    },
    "seldom": {"scheduling": {"method": "lru", "interval": 3, "prefill": "keep", **BUDGET}},
}


def evicting(name: str, folder) -> tuple[list, dict]:
    policy = POLICIES.get(name)
    kinds = WHOLE if policy.sums_layers or policy.needs_head_budget else MIXED
    scheduling = {"method": name, **BUDGET} | needed(name, folder, layers=len(kinds), heads=2, width=16)
    scheduling |= {"budget_tokens": 30} if policy.needs_head_budget else {}
    shards = 1 if policy.needs_one_shard else 2
    return kinds, {"page_size": 2, "storage": {"num_shards": shards, "placement": "position", **ROOMY}, "scheduling": scheduling}


def reading(name: str, folder) -> tuple[list, dict]:
    block = routing(name, folder, layers=3, shards=4, query_width=32)
    return MIXED, {"page_size": 2, "storage": {"num_shards": 4, **ROOMY, **placement(name)}, "routing": block}


def tiered(name: str, folder) -> tuple[list, dict]:
    block = {"page_size": 2, "storage": {}} | TIERS[name]
    return WHOLE, block | {"storage": {"num_shards": 2, "placement": "position", **ROOMY} | block["storage"]}


MADE = ((evicting, EVICTING), (reading, READING), (tiered, TIERS))
CASES = [(make, name, scene) for make, names in MADE for name in names for scene in SCENES]
# Short: a policy that sums attention, one that keeps times and queries, a router that counts. Long: all of them, in every scene.
SHORT = [(evicting, "h2o", "fork"), (evicting, "hazard_lru", "crops"), (reading, "cache_aware", "drops")]


@pytest.mark.parametrize(("make", "name", "scene"), short_or_long(SHORT, CASES), ids=lambda x: getattr(x, "__name__", x))
def test_a_row_is_as_it_is_alone(make, name, scene, tmp_path):
    kinds, config = make(name, tmp_path)
    rows = Rows(kinds, config)
    SCENES[scene](rows)
    assert rows.differences() == []


def test_keys_and_values_stay_shared(tmp_path):
    """Eight rows of one prefix hold its pages once, each with a counter of its own; what is reported is what is held."""
    kinds, config = evicting("h2o", tmp_path)
    rows = Rows(kinds, config | {"storage": {}, "page_size": 4})
    rows.feed([1], [20])
    before, bytes_before = rows.record_bytes, rows.probe.bytes
    rows.select([0] * 8)
    rows.feed([2] * 8, [1] * 8)
    opened = len(kinds) * 8 * rows.probe.near_pool(0).fmt.record_bytes
    assert rows.record_bytes <= before + opened, "a page of the prefix was copied"
    pool = rows.probe.near_pool(0)
    mass = pool.column("mass")
    assert pool.columns == ("mass",) and mass.shape == pool.page_table.shape
    assert rows.probe.bytes == sum(one.nbytes for one in rows.probe.all_pools) > bytes_before
    assert mass.nbytes == 4 * pool.page_table.numel()


def test_rows_of_a_cropped_prefix_start_over(tmp_path):
    """A row that keeps nothing counts nothing; one that is cropped behind what was counted is refused by name."""
    config = evicting("h2o", tmp_path)[1]
    rows = Rows(WHOLE, config)
    rows.feed([1, 2], [20, 20])
    rows.crop([0, 20])
    for _ in range(30):
        rows.feed([3, 4], [1, 1])
    assert rows.differences() == []
    rows = Rows(WHOLE, config)
    rows.feed([1], [20])
    rows.crop([18])
    with pytest.raises(RuntimeError, match=r"crop to 18 of 20 tokens: pikv.scheduling.method = 'h2o' has counted tokens up to 20"):
        rows.feed([2], [1])
    config = reading("bounds", tmp_path)[1]
    rows = Rows(WHOLE, config)
    rows.feed([1], [20])
    rows.crop([18])
    with pytest.raises(RuntimeError, match=r"pikv.routing.method = 'bounds' has counted tokens up to 20"):
        rows.feed([2], [1])


@pytest.mark.skipif(not LONG, reason="a model: the long form")
@pytest.mark.parametrize("method", [name for name in EVICTING if POLICIES.get(name).page_values])
@torch.no_grad()
def test_one_prefix_in_a_batch_of_a_model(method):
    """batch_repeat_interleave after the prefix, and each row alone, by transformers' own calls."""
    import pikv_ds

    model, tokenizer = bundled.load(torch.float32)
    base = torch.tensor([bundled.passkey_prompt(tokenizer, 600)[0]])
    prefix, suffixes = base[:, :48], [base[:, at : at + 12] for at in (200, 300)]
    scheduling = {"method": method, "budget_tokens": 40, "sink_tokens": 4, "recent_tokens": 8, "prefill": "keep"}
    with pikv_ds.attach(model, {"page_size": 8, "scheduling": scheduling}) as cache:
        feed = lambda rows: torch.cat([model(token, past_key_values=cache).logits for token in torch.cat(rows).split(1, 1)], 1)  # noqa: E731
        alone = []
        for suffix in suffixes:
            cache.begin_generation()
            model(prefix)
            alone.append(feed([suffix]))
        cache.begin_generation()
        model(prefix)
        cache.batch_repeat_interleave(2)
        assert (feed(suffixes) - torch.cat(alone)).abs().max() < 1e-4

"""The policies that predict: their formulas in plain loops, kept sets over the mix of forwards of test_evict.py."""

import math

import pytest
import torch
from safetensors.torch import save_file

from pikv_ds.errors import ConfigError
from tests.harness.driver import Driver, layer
from tests.harness.evicting import Kept, Page, evicting, last_position, last_use, uses
from tests.retention.test_evict import KINDS, SMALL, run_mix
from tests.retention_blocks import mlp_weights, needed

pytestmark = pytest.mark.usefixtures("nan_filled_empty")


def predicted_wait(page: Page, kept: Kept, i: int, row: int) -> float:
    used = uses(page)
    since = kept.driver.lens[row] - max(used, default=0)
    if len(used) < 2:
        return -since
    interval = (max(used) - min(used)) / (len(used) - 1)
    return -(interval - since) if since <= interval else -since


def risk(page: Page, kept: Kept, i: int, row: int) -> float:
    query, _ = kept.queries[i, row]
    group = query.shape[0] // kept.driver.layers[i].num_kv_heads
    keys = torch.stack([kept.driver.history[i][row][p][0] for p in page.positions]).double().mean(0)
    cos = sum(float(torch.cosine_similarity(query[h].double(), keys[h // group], dim=0)) for h in range(len(query))) / len(query)
    p = (len(uses(page)) + 1) / (sum(share > 0 for _, share, _, _ in page.shares) + 2)
    since = kept.driver.lens[row] - last_use(page)
    return -(0.5 * since / (since + 64) + 0.3 * (1 - cos) / 2 + 0.2 * (-p * math.log2(p) - (1 - p) * math.log2(1 - p)))


def two_queues(page: Page, *_) -> float:
    stored = min((at + 1 for at, share, _, _ in page.shares if share > 0), default=0)
    used = last_use(page)
    return 1e9 + used if used - stored >= 5 else page.positions[-1]


def away_from_the_others(page: Page, kept: Kept, i: int, row: int) -> float:
    """By the anchor of the page's shard; a cosine is the same for a latent, whose key has one head."""
    shard = next(pages for pages in kept.held[i][row] if page in pages)
    unit = {p: kept.driver.history[i][row][p][0].double() for each in shard for p in each.positions}
    unit = {p: k / k.norm(dim=-1, keepdim=True) for p, k in unit.items()}
    anchor = sum(unit.values()) / len(unit)
    return -sum(float(torch.cosine_similarity(unit[p], anchor, dim=-1).mean()) for p in page.positions) / len(page.positions)


def peak(page: Page, *_) -> float:
    return max(share for _, share, _, _ in page.shares)


ORACLES = {
    "kvzip": (peak, {}),
    "keydiff": (away_from_the_others, {}),
    "belady": (predicted_wait, {}),
    "hazard_lru": (risk, {}),
    "two_queue": (two_queues, {"correlated": 5}),
    "flexgen": (last_position, {"drop_lower_tiers": True}),
}


@pytest.mark.parametrize("method", ORACLES)
@pytest.mark.parametrize(("num_shards", "page_size"), [(1, 1), (4, 3)], ids=["S1-page1", "S4-page3"])
def test_kept_sets(num_shards, page_size, method):
    score, options = ORACLES[method]
    scheduling = {"method": method, "budget_tokens": 24 if num_shards == 1 else 29, **SMALL, **options}
    driver, kept = evicting(KINDS, score, scheduling, page_size=page_size, num_shards=num_shards)
    run_mix(driver)
    assert kept.evicted > 100


def network(page: Page, kept: Kept, i: int, row: int) -> float:
    w1, b1, w2, b2 = (tensor[i].double() for tensor in mlp_weights(layers=2, heads=2, width=16).values())
    total = 0.0
    for p in page.positions:
        k, v = (x.double() for x in kept.driver.history[i][row][p])
        for h in range(2):
            hidden = [max(0.0, float(w1[h, n] @ torch.cat([k[h], v[h]]) + b1[h, n])) for n in range(w1.shape[1])]
            total += sum(float(w) * x for w, x in zip(w2[h], hidden, strict=True)) + float(b2[h])
    return total / len(page.positions) / 2


@pytest.mark.parametrize("num_shards", [1, 2], ids="S{}".format)
def test_learned_scores(num_shards, tmp_path):
    own = needed("quest_mlp", tmp_path, layers=2, heads=2, width=16)
    scheduling = {"method": "quest_mlp", "budget_tokens": 24, **SMALL, **own}
    driver, kept = evicting([layer(0), layer(1)], network, scheduling, page_size=3, num_shards=num_shards)
    driver.prefill([40, 25])
    for _ in range(6):
        driver.decode()
    assert kept.evicted > 60


@pytest.mark.parametrize("head_budget", ["uniform", "adaptive"])
def test_learned_scores_of_heads(head_budget, tmp_path):
    """With a page per head each row is scored by its own head's network; their mean is the shared score."""
    own = needed("quest_mlp", tmp_path, layers=1, heads=2, width=16)
    base = {"method": "quest_mlp", "budget_tokens": 200, **SMALL, **own}
    shared, apart = (Driver([layer(0)], page_size=4, scheduling=base | {"head_budget": which}) for which in ("shared", head_budget))
    for driver in (shared, apart):
        driver.prefill([33, 21])
    both, each = (d.probe.scores(0).flatten(1)[:, :9] for d in (shared, apart))
    assert torch.allclose(both[0], (each[0] + each[1]) / 2, atol=1e-5) and torch.allclose(
        both[1, :6], (each[2] + each[3])[:6] / 2, atol=1e-5
    )
    assert not torch.allclose(each[0], each[1], atol=1e-2)


def geometry(layers: int, heads: int, width: int) -> dict:
    return {"layers": layers, "heads": heads, "width": width}


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (geometry(1, 2, 16), "layer 1 of this model has 2 KV heads with 16"),
        (geometry(2, 4, 16), "for 2 layers of 4 KV heads"),
        (geometry(2, 2, 24), "k_dim \\+ v_dim = 24"),
    ],
    ids=["layers", "heads", "width"],
)
def test_weights_of_another_model_are_refused(made, said, tmp_path):
    scheduling = {"method": "quest_mlp", "budget_tokens": 50, **SMALL, **needed("quest_mlp", tmp_path, **made)}
    with pytest.raises(ConfigError, match=said):
        Driver([layer(0), layer(1)], scheduling=scheduling)


def test_files_without_weights_are_refused(tmp_path):
    weights = mlp_weights(**geometry(2, 2, 16))
    broken = {
        "short": {**weights, "b1": weights["b1"][:, :1]},
        "nan": {**weights, "w2": weights["w2"] * torch.nan},
        "other": {"gate": weights["b2"]},
    }
    for name, tensors in broken.items():
        save_file({key: x.contiguous() for key, x in tensors.items()}, tmp_path / name)
    for path in [*(tmp_path / name for name in broken), tmp_path / "missing"]:
        with pytest.raises(ConfigError, match=r"path = a (readable safetensors )?file"):
            Driver([layer(0)], scheduling={"method": "quest_mlp", "budget_tokens": 50, **SMALL, "path": str(path)})
    with pytest.raises(ConfigError, match=r"scheduling.path = None.*needs it"):
        Driver([layer(0)], scheduling={"method": "quest_mlp", "budget_tokens": 50, **SMALL})


def test_a_plan_over_tiers_that_do_not_exist_is_refused():
    for options in ({}, {"drop_lower_tiers": False}):
        with pytest.raises(ConfigError, match="drop_lower_tiers"):
            Driver([layer(0)], scheduling={"method": "flexgen", "budget_tokens": 50, **SMALL, **options})

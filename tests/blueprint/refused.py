"""For every rule (pikv_ds/blueprint/rules.py) blocks that it refuses, alone or on layers that need it."""

from dataclasses import replace
from pathlib import Path

import torch

from pikv_ds.blueprint.blueprint import Blueprint
from pikv_ds.config.pikv import PiKVConfig
from tests.harness.driver import layer
from tests.retention_blocks import needed
from tests.routing_blocks import routing

PLAIN = [layer(0, dim=16), layer(1, dim=16)]
WINDOWS = [layer(0, dim=16, window=9)]
CAPPED = [replace(layer(0, dim=16), softcap=30.0)]
SVD, RAW = {"method": "svd", "rank": 8}, {"raw_recent_tokens": 8}
BOUNDS = {"method": "bounds", "budget_ratio": 0.5}
ROUTED = {"method": "topk", "exchange": "routed"}
LRU = {"method": "lru", "budget_tokens": 200}
PREFIX = {"prefix": {"enabled": True}}
COPIES = {"num_shards": 4, "rebalance": {"replicas": 1}}
AGED = [{"method": "aged"}]
TIERS = {"device_gib": 1e-3, "host_gib": 1.0}
HEADS = {"method": "knorm", "budget_tokens": 200, "head_budget": "uniform"}


def refused(folder: Path) -> dict[str, list[dict]]:
    """Rule -> cases: blocks of "pikv", and "layers" and "ranks" where these are looked at."""
    mlp = needed("quest_mlp", folder, layers=2, heads=2, width=32)
    other = needed("quest_mlp", folder, layers=1, heads=3, width=32)
    gate = routing("learned", folder, layers=2, shards=1, query_width=64)
    other_gate = routing("learned", folder, layers=1, shards=1, query_width=64)
    rotated = {"method": "int8", "rotate": "hadamard"}
    return {
        "two-pool-codec-alone": [
            {"compression": {"method": "int8", "k": {"method": "adaptive"}}},
            {"compression": {"method": "adaptive", "v": {"method": "int8"}}},
            {"compression": {"layers": {"0": {"method": "adaptive"}}}},
        ],
        "request-codec-alone": [{"compression": SVD | {"k": {"method": "int8"}}}, {"compression": {"layers": {"0": SVD}}}],
        "page-holds-groups": [{"page_size": 8, "compression": {"method": "int8"}}],
        "nothing-evicted-no-budget": [{"scheduling": {"budget_tokens": 200}}],
        "nothing-evicted-shared-heads": [{"scheduling": {"head_budget": "uniform"}}, {"scheduling": {"head_budget": "adaptive"}}],
        "policy-needs-one-budget": [{"scheduling": {"method": "lru"}}, {"scheduling": LRU | {"budget_ratio": 0.5}}],
        "budget-holds-pinned-tokens": [{"scheduling": {"method": "lru", "budget_tokens": 20}}],
        "router-takes-no-budget": [{"routing": {"budget_pages": 4}}, {"routing": {"method": "topk", "budget_ratio": 0.5}}],
        "router-needs-one-budget": [{"routing": {"method": "bounds"}}, {"routing": BOUNDS | {"budget_pages": 40}}],
        "budget-holds-pinned-pages": [{"routing": {"method": "bounds", "budget_pages": 1}}],
        "needed-exchange-reads-a-part": [{"routing": {"exchange": "needed"}}],
        "needed-exchange-distinct": [{"routing": BOUNDS | {"exchange": "needed"}, "storage": {"requests": "replicated"}}],
        "routed-exchange-own-pages": [{"routing": {"method": "centroids", "budget_ratio": 0.5, "exchange": "routed"}}],
        "routed-exchange-own-facts": [{"routing": ROUTED | {"method": "cache_aware"}}],
        "routed-exchange-unwatched": [{"routing": ROUTED, "scheduling": {"method": "h2o", "budget_tokens": 200}}],
        "routed-exchange-one-pool": [{"routing": ROUTED, "compression": RAW}, {"routing": ROUTED, "compression": {"method": "adaptive"}}],
        "routed-exchange-shared-bases": [{"routing": ROUTED, "compression": SVD}],
        "router-follows-experts": [
            {"routing": {"method": "experts"}, "storage": {"placement": "position"}},
            {"routing": {"method": "experts"}, "storage": {"expert_ids": "true"}},
        ],
        "penalty-moves-entries": [{"routing": {"host_penalty": {"load": 1.0}}, "storage": {"expert_ids": "hash"}}],
        "summed-layers-alike": [{"scheduling": {"method": "duo", "budget_tokens": 200, "layer_budget": "pyramid"}}],
        "policy-head-budget": [{"scheduling": {"method": "duo_heads", "budget_tokens": 200} | _path(folder)}],
        "heads-read-everything": [{"scheduling": HEADS, "routing": BOUNDS}],
        "heads-without-threshold": [{"scheduling": {"method": "adakv", "budget_tokens": 200, "head_budget": "uniform"}}],
        "policy-sees-attention": [{"scheduling": LRU, "storage": {"expert_ids": "true"}}],
        "two-pools-svd-router": [{"compression": SVD | RAW, "routing": BOUNDS}],
        "two-pools-shared-heads": [{"compression": RAW, "scheduling": HEADS}, {"compression": {"method": "adaptive"}, "scheduling": HEADS}],
        "two-pools-no-byte-budget": [{"compression": RAW, "scheduling": {"method": "lru", "budget_bytes": 1 << 20}}],
        "budget-holds-raw-window": [{"compression": {"raw_recent_tokens": 500}, "routing": {"method": "bounds", "budget_pages": 3}}],
        "two-pools-needed-exchange": [{"compression": RAW, "routing": {"method": "topk", "exchange": "needed"}}],
        "light-codec-sees-attention": [{"compression": {"method": "adaptive"}, "storage": {"expert_ids": "true"}}],
        "pools-read-all": [{"pools": AGED, "routing": BOUNDS}],
        "pools-shared-heads": [{"pools": AGED, "scheduling": HEADS}],
        "pools-no-byte-budget": [{"pools": AGED, "scheduling": {"method": "lru", "budget_bytes": 1 << 20}}],
        "pools-no-request-bases": [{"pools": AGED, "compression": SVD}],
        "pools-in-order": [
            {"pools": AGED, "compression": {"raw_recent_tokens": 500}},
            {"pools": [{"method": "aged", "after_tokens": 64}, {"method": "aged", "after_tokens": 32}]},
        ],
        "pools-full-attention": [{"pools": AGED, "layers": WINDOWS}],
        "router-follows-demotion": [{"compression": RAW, "routing": {"method": "keeps_summaries", "budget_ratio": 0.5}}],
        "policy-follows-bases": [{"compression": SVD, "scheduling": {"method": "keeps_queries", "budget_tokens": 200}}],
        "router-follows-bases": [{"compression": SVD, "routing": {"method": "keeps_summaries", "budget_ratio": 0.5}}],
        "shards-divide-among-ranks": [{"storage": {"num_shards": 3}, "ranks": 2}],
        "offload-one-pool": [{"offload": TIERS, "compression": RAW}, {"offload": TIERS, "pools": AGED}],
        "offload-whole-pages": [{"offload": TIERS, "page_size": 32, "routing": BOUNDS | {"block_size": 8}}],
        "blocks-need-a-router": [{"page_size": 32, "routing": {"method": "centroids", "budget_ratio": 0.5, "block_size": 8}}],
        "blocks-divide-pages": [{"page_size": 32, "routing": BOUNDS | {"block_size": 5}}],
        "blocks-fit-formats": [
            {"page_size": 32, "routing": BOUNDS | {"block_size": 8}, "layers": CAPPED},
            {"page_size": 96, "routing": BOUNDS | {"block_size": 32}, "compression": {"method": "int4", "group": 48}, "layers": PLAIN},
        ],
        "offload-no-request-bases": [{"offload": TIERS, "compression": SVD}],
        "offload-no-prefix": [{"offload": TIERS, "storage": PREFIX}],
        "offload-stays-where-it-is": [{"offload": TIERS, "storage": {"rebalance": {}}}],
        "offload-no-budget": [{"offload": TIERS, "scheduling": {"method": "knorm", "budget_tokens": 200}}],
        "offload-policy-of-what-is-stored": [{"offload": TIERS, "scheduling": {"method": "lru"}}],
        "offload-shared-heads": [{"offload": TIERS, "scheduling": {"method": "knorm", "head_budget": "uniform"}}],
        "offload-full-attention": [{"offload": TIERS, "layers": WINDOWS}],
        "offload-holds-pages": [
            {"offload": {"device_gib": 1e-9, "host_gib": 1.0}, "layers": PLAIN},
            {"offload": TIERS | {"staging_mib": 1e-6}, "layers": PLAIN},
        ],
        "prefix-no-request-bases": [{"storage": PREFIX, "compression": SVD}],
        "prefix-keeps-all": [{"storage": PREFIX, "scheduling": LRU}],
        "prefix-one-pool": [{"storage": PREFIX, "compression": RAW}, {"storage": PREFIX, "pools": AGED}],
        "prefix-no-learning-router": [{"storage": PREFIX, "routing": BOUNDS}],
        "prefix-stays-where-it-is": [{"storage": PREFIX | {"rebalance": {}}}],
        "prefix-names-requests": [{"storage": PREFIX, "ranks": 2}],
        "prefix-no-windows": [{"storage": PREFIX, "layers": WINDOWS}],
        "copies-have-one-reader": [
            {"storage": COPIES, "scheduling": {"method": "h2o", "budget_tokens": 200}},
            {"storage": COPIES, "routing": BOUNDS},
            {"storage": COPIES, "routing": {"method": "topk"}},
            {"storage": COPIES, "compression": SVD},
        ],
        "copies-are-of-other-ranks": [{"storage": {"rebalance": {"replicas": 3}, "num_shards": 4}, "ranks": 2}],
        "rebalance-has-shards-to-move": [
            {"storage": {"rebalance": {}}, "ranks": 2},
            {"storage": {"rebalance": {"every": 9}, "num_shards": 4}, "ranks": 4},
        ],
        "table-fits-model": [{"storage": {"placement": "table", "table": [[[0]] * 5]}}],
        "eviction-full-attention": [{"scheduling": LRU, "layers": WINDOWS}],
        "policy-one-shard": [{"scheduling": {"method": "expected_attention", "budget_ratio": 0.5}, "storage": {"num_shards": 2}}],
        "summed-layers-placed-alike": [{"scheduling": {"method": "duo", "budget_ratio": 0.5}, "ranks": 2}],
        "heads-of-all-layers": [
            {"scheduling": HEADS, "layers": [layer(0, dim=16), layer(1, dim=16, window=9)]},
            {"scheduling": HEADS, "layers": [layer(0, dim=16, latent=True)]},
            {"scheduling": HEADS, "layers": [layer(0, dim=16), layer(1, dim=16, num_kv_heads=1)]},
        ],
        "policy-fits-model": [{"scheduling": {"method": "quest_mlp", "budget_ratio": 0.5} | other}],
        "two-pools-full-attention": [{"compression": RAW, "layers": WINDOWS}],
        "fast-needs-integers": [{"ops": {"precision": "fast"}}],
        "layers-of-the-model": [{"compression": {"layers": {"7": {"method": "int8"}}}}],
        "codec-fits-layer": [
            {"compression": {"k": {"method": "int8"}}, "layers": [layer(0, dim=16, latent=True)]},
            {"compression": {"method": "int8", "rope_raw": True}},
            {"compression": {"method": "svd", "rank": 32}},
        ],
        "policy-needs-model-queries": [{"scheduling": {"method": "quest_mlp", "budget_ratio": 0.5} | mlp, "compression": rotated}],
        "router-needs-model-queries": [{"routing": gate, "compression": rotated}],
        "softcap-without-maps": [{"compression": rotated, "layers": CAPPED}, {"compression": SVD, "layers": CAPPED}],
        "softcap-without-shares": [{"scheduling": LRU, "layers": CAPPED}],
        "budget-holds-pinned-pages-of-shards": [{"scheduling": {"method": "lru", "budget_tokens": 68}}],
        "router-fits-model": [{"routing": other_gate}],
    }  # fmt: skip


def read(case: dict) -> PiKVConfig:
    return PiKVConfig(**{key: value for key, value in case.items() if key not in ("layers", "ranks")})


def planned(config: PiKVConfig, case: dict) -> Blueprint:
    return Blueprint.of(config, case.get("layers", PLAIN), torch.float32, ranks=case.get("ranks", 1), num_experts=8)


def _path(folder: Path) -> dict:
    return {"path": needed("duo_heads", folder, layers=2, heads=2, width=32)["path"]}

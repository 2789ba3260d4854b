"""The settings that are paired, and the configuration that a choice of them makes. The first of each is the default."""

from __future__ import annotations

from pathlib import Path

from pikv_ds.policies import POLICIES
from pikv_ds.retention.budgets import least_entries
from pikv_ds.routers import ROUTERS
from pikv_ds.spec import LayerSpec
from tests.calibrations import random_calibration
from tests.harness.driver import layer
from tests.retention_blocks import needed
from tests.routing_blocks import PINS, routing
from tests.unrotated import unrotated

EXPERTS, DIM, Q_HEADS = 8, 16, 4
LAYERS: dict[str, list[LayerSpec]] = {
    "full": [layer(0, dim=DIM), layer(1, dim=DIM)],
    "window": [layer(0, dim=DIM), layer(1, dim=DIM, window=24)],
    "latent": [layer(0, dim=DIM), layer(1, dim=DIM - 8, latent=True)],
    "windows": [layer(0, dim=DIM, window=24), layer(1, dim=DIM, window=40)],
}
CODECS = ("none", "int8", "int4", "int2", "fp8_e4m3", "fp4_e2m1", "adaptive", "svd", "lora", "lora_plus", "unrotated", "crop")
SETTINGS: dict[str, tuple] = {
    "layers": tuple(LAYERS),
    "page_size": (64, 8, 1),
    "codec": CODECS,
    "sides": ("same", "k int8", "v fp8"),
    "one_layer": ("same", "int8", "none"),
    "rotate": ("none", "hadamard"),
    "raw": ("none", "sinks", "recent", "both"),
    "shards": (1, 2, 4),
    "placement": ("experts", "position", "xor", "table"),
    "expert_ids": ("previous_layer", "true", "hash"),
    "requests": ("auto", "replicated", "distinct"),
    "overflow": ("spill", "error"),
    "router": ("all", "bounds", "centroids", "page_oracle", "topk", "experts", "cache_aware", "learned", "shuffle_shards"),
    "read": ("ratio", "pages"),
    "exchange": ("all", "needed"),
    "penalty": (0, 1),
    "policy": ("none", "streaming_llm", "lru", "h2o", "knorm", "snapkv", "expected_attention", "duo", "quest_mlp", "duo_heads", "kvzip"),
    "budget": ("tokens", "ratio", "bytes"),
    "layer_budget": ("uniform", "pyramid"),
    "head_budget": ("shared", "uniform", "adaptive"),
    "interval": (1, 3),
    "prefill": ("evict", "keep"),
}
SINKS, RECENT = {"raw_sink_tokens": 3}, {"raw_recent_tokens": 8}
RAW = {"none": {}, "sinks": SINKS, "recent": RECENT, "both": SINKS | RECENT}
Case = dict[str, object]


def defaults() -> Case:
    return {name: values[0] for name, values in SETTINGS.items()}


def layers_of(case: Case) -> list[LayerSpec]:
    return LAYERS[case["layers"]]


def blocks(case: Case, folder: Path) -> dict[str, object]:
    """The "pikv" block; what methods read from files is written to `folder`."""
    return {
        "page_size": case["page_size"],
        "storage": _storage(case),
        "compression": _compression(case, folder),
        "routing": _routing(case, folder),
        "scheduling": _scheduling(case, folder),
    }


def _storage(case: Case) -> dict:
    shards = case["shards"]
    block = {"num_shards": shards, "placement": case["placement"], "expert_ids": case["expert_ids"], "requests": case["requests"]}
    if case["overflow"] == "error":  # room enough
        block |= {"overflow": "error", "capacity_tokens": 2000}
    if case["placement"] == "xor":
        block["n_tok"] = 4
    if case["placement"] == "table":
        block["table"] = [[[expert % shards] for expert in range(EXPERTS)]]
    return block


def _compression(case: Case, folder: Path) -> dict:
    method = case["codec"]
    block = {"method": method, "rotate": case["rotate"]} | RAW[case["raw"]]
    if method == "unrotated":  # coefficients of keys before their rotation, all of them
        block |= unrotated(LAYERS["full"], folder)
    elif method in ("lora", "lora_plus", "crop", "svd"):  # all directions are kept: what is stored says the same
        block["rank"] = DIM
    if method in ("lora", "lora_plus", "crop"):
        path = folder / "random.safetensors"
        if not path.exists():
            random_calibration(LAYERS["full"]).save(path)
        block["calibration"] = str(path)
    if case["sides"] != "same":
        side, codec = case["sides"].split()
        block[side] = {"method": {"int8": "int8", "fp8": "fp8_e4m3"}[codec]}
    if case["one_layer"] != "same":
        block["layers"] = {"1": {"method": case["one_layer"]}}
    return block


def _routing(case: Case, folder: Path) -> dict:
    name, router = case["router"], ROUTERS.get(case["router"])
    block = routing(name, folder, layers=2, shards=case["shards"], query_width=Q_HEADS * DIM, specs=LAYERS[case["layers"]])
    if router.budgeted and not router.reads_all:
        del block["budget_pages"]
        block |= {"budget_ratio": 0.6} if case["read"] == "ratio" else {"budget_pages": -(-192 // case["page_size"])}
    if name == "shuffle_shards":
        block["base"] = "topk"
    return block | {"exchange": case["exchange"], "host_penalty": {"load": case["penalty"]}}


def _scheduling(case: Case, folder: Path) -> dict:
    name = case["policy"]
    block = {key: case[key] for key in ("layer_budget", "head_budget", "interval", "prefill")} | {"method": name}
    if POLICIES.get(name).keeps_all:
        return block
    own = {key: value for key, value in needed(name, folder, layers=2, heads=2, width=2 * DIM).items() if key != "head_budget"}
    budget = {"tokens": least(case) + 8, "ratio": 0.7, "bytes": 1000 * (least(case) + 8)}  # an entry of both layers is 512 bytes at most
    return block | PINS | {f"budget_{case['budget']}": budget[case["budget"]]} | own


def least(case: Case) -> int:
    """Entries that pages of pinned tokens can hold: no budget may be smaller."""
    return least_entries(PINS["sink_tokens"], PINS["recent_tokens"], case["page_size"], case["shards"])

import json

import pytest

from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.errors import ConfigError

DEFAULTS = {
    "preset": None,
    "enabled": True,
    "page_size": None,
    "timeout_s": 300,
    "probe": "auto",
    "storage": {
        "requests": "auto",
        "num_shards": None,
        "placement": "experts",
        "expert_ids": "previous_layer",
        "n_tok": 1,
        "table": None,
        "gate_path": None,
        "capacity_tokens": None,
        "overflow": "spill",
        "audit": False,
        "prefix": {"enabled": False, "budget_tokens": 65536, "eviction": "lru"},
        "rebalance": None,
    },
    "routing": {
        "method": "all",
        "budget_ratio": None,
        "budget_pages": None,
        "block_size": None,
        "sink_tokens": 4,
        "recent_tokens": 64,
        "exchange": "all",
        "host_penalty": {"load": 0, "miss": 0, "applies_to": "selection"},
    },
    "compression": {
        "method": "none",
        "rotate": "none",
        "rotate_seed": 0,
        "k": None,
        "v": None,
        "raw_sink_tokens": None,
        "raw_recent_tokens": None,
        "layers": None,
    },  # fmt: skip
    "scheduling": {
        "method": "none",
        "budget_tokens": None,
        "budget_ratio": None,
        "budget_bytes": None,
        "layer_budget": "uniform",
        "head_budget": "shared",
        "head_floor": 0.2,
        "granularity": "page",
        "interval": 1,
        "prefill": "auto",
        "sink_tokens": 4,
        "recent_tokens": 64,
    },
    "pools": (),
    "offload": {
        "device_gib": None,
        "host_gib": 0,
        "nvme_path": None,
        "nvme_gib": 0,
        "nvme_io": "threads",
        "staging_mib": 64,
        "prefetch": "none",
    },
    "ops": {"precision": "high", "mixed_kernels": False},
    "monitor": {"enabled": True, "interval": 100},
}


def test_defaults_are_the_documented_block():
    assert PiKVConfig().model_dump() == DEFAULTS
    assert PiKVConfig.parse(DEFAULTS) == PiKVConfig()


def test_page_size_null_is_the_codecs_choice():
    assert PiKVConfig().resolve_page_size() == 32
    assert PiKVConfig(page_size=1).resolve_page_size() == 1


# block -> what the message must say: full key, value given, legal values
BAD = {
    "unknown key": (
        {"page_sise": 16},
        ["unknown key pikv.page_sise = 16", "legal keys of pikv are preset, enabled", "mean 'page_size'?"],
    ),
    "unknown nested key": ({"storage": {"shards": 2}}, ["unknown key pikv.storage.shards = 2", "num_shards"]),
    "page_size 0": ({"page_size": 0}, ["pikv.page_size = 0", ">= 1 and <= 256", "null"]),
    "page_size 257": ({"page_size": 257}, ["pikv.page_size = 257", ">= 1 and <= 256"]),
    "page_size text": ({"page_size": "32"}, ["pikv.page_size = '32'", "an integer"]),
    "page_size bool": ({"page_size": True}, ["pikv.page_size = True", "an integer"]),
    "enabled 1": ({"enabled": 1}, ["pikv.enabled = 1", "true or false"]),
    "timeout 0": ({"timeout_s": 0}, ["pikv.timeout_s = 0", "> 0"]),
    "timeout inf": ({"timeout_s": float("inf")}, ["pikv.timeout_s = inf", "finite"]),
    "section not an object": ({"storage": 3}, ["pikv.storage = 3", "an object with the keys requests"]),
    "section null": ({"routing": None}, ["pikv.routing = None", "an object with the keys method"]),
    "requests": (
        {"storage": {"requests": "same"}},
        ["pikv.storage.requests = 'same'", "'auto', 'replicated', 'distinct'"],
    ),
    "placement": ({"storage": {"placement": "hash"}}, ["pikv.storage.placement = 'hash'", "'xor'", "'table'"]),
    "expert_ids": ({"storage": {"expert_ids": "next"}}, ["pikv.storage.expert_ids = 'next'", "'lookahead'", "'hash'"]),
    "overflow": ({"storage": {"overflow": "drop"}}, ["pikv.storage.overflow = 'drop'", "'spill', 'error'"]),
    "num_shards": ({"storage": {"num_shards": 0}}, ["pikv.storage.num_shards = 0", ">= 1"]),
    "capacity": ({"storage": {"capacity_tokens": 0}}, ["pikv.storage.capacity_tokens = 0", ">= 1"]),
    "n_tok 3": ({"storage": {"placement": "xor", "n_tok": 3}}, ["pikv.storage.n_tok = 3", "power of two"]),
    "n_tok 0": ({"storage": {"placement": "xor", "n_tok": 0}}, ["pikv.storage.n_tok = 0", ">= 1"]),
    "n_tok without xor": ({"storage": {"n_tok": 4}}, ["pikv.storage.n_tok = 4", "'experts'", "'xor'"]),
    "table missing": ({"storage": {"placement": "table"}}, ["pikv.storage.table = None", "placement = 'table'"]),
    "table unused": ({"storage": {"table": [[[0]]]}}, ["pikv.storage.table", "null", "'experts'"]),
    "gate missing": ({"storage": {"expert_ids": "gate"}}, ["pikv.storage.gate_path = None", "expert_ids = 'gate'"]),
    "gate unused": ({"storage": {"gate_path": "g"}}, ["pikv.storage.gate_path = 'g'", "null", "'previous_layer'"]),
    "host tier": ({"offload": {"host_gib": 8}}, ["pikv.offload.device_gib = None", "host_gib"]),
    "nothing below": ({"offload": {"device_gib": 1.0}}, ["pikv.offload.host_gib = 0", "nvme_path"]),
    "nvme tier": ({"offload": {"device_gib": 1.0, "nvme_path": "d"}}, ["pikv.offload.nvme_gib = 0", "nvme_path"]),
    "prefetch": ({"offload": {"device_gib": 1.0, "host_gib": 1.0, "prefetch": "experts"}}, ["pikv.offload.prefetch = 'experts'", "scores"]),
    "budget": ({"scheduling": {"budget_tokens": 9}}, ["pikv.scheduling.budget_tokens = 9", "method = 'none'"]),
    "router": ({"routing": {"method": "top"}}, ["pikv.routing.method = 'top'", "'all'", "'topk'"]),
    "removed router": (
        {"routing": {"method": "hierarchical", "budget_ratio": 0.1}},
        ["pikv.routing.method = 'hierarchical' was removed", "worse than 'bounds'", "R_H is 'two_stage'", "use 'bounds' or 'two_stage'"],
    ),
    "codec": ({"compression": {"method": "zip"}}, ["pikv.compression.method = 'zip'", "'none'"]),
    "policy": ({"scheduling": {"method": "mru"}}, ["pikv.scheduling.method = 'mru'", "'none'"]),
    "single entries": (
        {"scheduling": {"method": "lru", "budget_tokens": 99, "granularity": "token"}},
        ["pikv.scheduling.granularity = 'token' was removed", "'page'", '"page_size": 1', "pads every record", "docs/concepts/eviction.md"],
    ),
    "granularity": ({"scheduling": {"granularity": "head"}}, ["pikv.scheduling.granularity = 'head'", "'page'"]),
    "no eviction budget": ({"scheduling": {"method": "lru"}}, ["pikv.scheduling", "one of budget_tokens, budget_ratio, budget_bytes"]),
    "two eviction budgets": (
        {"scheduling": {"method": "lru", "budget_tokens": 99, "budget_ratio": 0.5}},
        ["99", "0.5", "one of budget_tokens"],
    ),
    "small budget": (
        {"scheduling": {"method": "lru", "budget_tokens": 67}},
        ["pikv.scheduling.budget_tokens = 67", ">= 68", "sink_tokens = 4", "recent_tokens = 64"],
    ),
    "ratio": ({"scheduling": {"method": "lru", "budget_ratio": 1.5}}, ["pikv.scheduling.budget_ratio = 1.5", "> 0 and <= 1"]),
    "policy option": ({"scheduling": {"method": "lru", "budget_tokens": 99, "treshold": 1.0}}, ["treshold", "mean 'threshold'?"]),
    "policy option value": ({"scheduling": {"method": "lru", "budget_tokens": 99, "threshold": -1.0}}, ["threshold > 0", "-1.0"]),
    "router option": (
        {"routing": {"method": "bounds", "budget_ratio": 0.1, "metadat": "bf16"}},
        ["pikv.routing.metadat = 'bf16'", "metadata"],
    ),
    "exchange without a router": (
        {"routing": {"exchange": "needed"}},
        ["pikv.routing.exchange = 'needed'", "'all'", "reads on every rank"],
    ),
    "exchange of replicated requests": (
        {"routing": {"method": "topk", "exchange": "needed"}, "storage": {"requests": "replicated"}},
        ["pikv.routing.exchange = 'needed'", "every rank needs all partials"],
    ),
    "spread": ({"routing": {"method": "bounds", "budget_ratio": 0.1, "spread": 1.5}}, ["pikv.routing", "spread from 0 to 1, got 1.5"]),
    "router metadata": ({"routing": {"method": "bounds", "budget_ratio": 0.1, "metadata": "int3"}}, ["pikv.routing.metadata = 'int3'"]),
    "budget of all": ({"routing": {"budget_ratio": 0.1}}, ["pikv.routing.budget_ratio = 0.1", "null", "'all'"]),
    "budget of a shard router": (
        {"routing": {"method": "topk", "budget_pages": 64}},
        ["pikv.routing.budget_pages = 64", "null", "'topk'", "whole shards"],
    ),
    "no gate": ({"routing": {"method": "learned"}}, ["pikv.routing.path = None", "method 'learned' needs it"]),
    "no such gate": ({"routing": {"method": "learned", "path": "/nowhere.safetensors"}}, ["'path': '/nowhere.safetensors'", "readable"]),
    "top_k 0": ({"routing": {"method": "topk", "top_k": 0}}, ["top_k of at least 1, got 0"]),
    "experts by position": (
        {"routing": {"method": "experts"}, "storage": {"placement": "position"}},
        ["pikv.routing.method = 'experts'", "placement = 'position'", "previous_layer"],
    ),
    "penalty below 0": ({"routing": {"host_penalty": {"load": -1}}}, ["pikv.routing.host_penalty.load = -1", ">= 0"]),
    "penalty infinite": ({"routing": {"host_penalty": {"miss": float("inf")}}}, ["pikv.routing.host_penalty.miss = inf", "finite"]),
    "penalty mode": (
        {"routing": {"host_penalty": {"load": 1, "applies_to": "weights"}}},
        ["pikv.routing.host_penalty.applies_to = 'weights'", "'selection', 'selection_and_weights'"],
    ),
    "penalty on what names nothing": (
        {"routing": {"host_penalty": {"load": 1}}, "storage": {"expert_ids": "hash"}},
        ["pikv.routing.host_penalty", "expert_ids = 'hash'", "load 0 and miss 0"],
    ),
    "experts known too late": ({"routing": {"method": "experts"}, "storage": {"expert_ids": "true"}}, ["'experts'", "expert_ids = 'true'"]),
    "no budget": ({"routing": {"method": "bounds"}}, ["'bounds'", "one of budget_ratio and budget_pages"]),
    "two budgets": (
        {"routing": {"method": "bounds", "budget_ratio": 0.1, "budget_pages": 64}},
        ["'budget_ratio': 0.1, 'budget_pages': 64", "one of budget_ratio and budget_pages"],
    ),
    "budget ratio 0": ({"routing": {"method": "bounds", "budget_ratio": 0.0}}, ["pikv.routing.budget_ratio = 0.0", "> 0"]),
    "budget ratio 2": ({"routing": {"method": "bounds", "budget_ratio": 2.0}}, ["pikv.routing.budget_ratio = 2.0", "<= 1"]),
    "budget below sinks and window": (
        {"page_size": 4, "routing": {"method": "bounds", "budget_pages": 16, "sink_tokens": 4, "recent_tokens": 64}},
        ["pikv.routing.budget_pages = 16", "at least 17", "16 pages of 4 tokens", "sink_tokens 4", "recent_tokens 64"],
    ),
    "sinks": ({"routing": {"sink_tokens": -1}}, ["pikv.routing.sink_tokens = -1", ">= 0"]),
    "precision": ({"ops": {"precision": "low"}}, ["pikv.ops.precision = 'low'", "'high'", "'fast'"]),
    "interval": ({"monitor": {"interval": 0}}, ["pikv.monitor.interval = 0", ">= 1"]),
    "two at once": ({"page_size": 0, "monitor": {"interval": 0}}, ["pikv.page_size = 0", "pikv.monitor.interval = 0"]),
}


@pytest.mark.parametrize("block, said", BAD.values(), ids=BAD.keys())
def test_bad_blocks_name_key_value_and_legal_values(block, said):
    with pytest.raises(ConfigError) as caught:
        PiKVConfig(**block)
    for text in said:
        assert text in str(caught.value)
    with pytest.raises(ConfigError):
        PiKVConfig.parse({"pikv": block})


def tables():
    yield "empty", [], None, "no empty level"
    yield "no replica slot", [[[]]], None, "no empty level"
    yield "ragged experts", [[[0], [1]], [[0]]], None, "table[1]"
    yield "ragged replicas", [[[0, 1], [1]]], None, "table[0][1]"
    yield "no home", [[[-1], [0]]], None, "at least one shard id"
    yield "below -1", [[[-2], [0]]], None, "-1 (no replica)"
    yield "beyond num_shards", [[[0], [2]]], 2, "0 to 1"
    yield "twice on one shard", [[[1, 1], [0, -1]]], None, "different shards"
    yield "text", [[["a"]]], None, "integers"


@pytest.mark.parametrize("table, num_shards, said", [case[1:] for case in tables()], ids=[case[0] for case in tables()])
def test_bad_tables(table, num_shards, said):
    with pytest.raises(ConfigError, match=r"pikv\.storage\.table") as caught:
        PiKVConfig(storage={"placement": "table", "table": table, "num_shards": num_shards})
    assert said in str(caught.value)


def test_good_combinations():
    table = PiKVConfig(storage={"placement": "table", "table": [[[0, -1], [1, 0]]], "num_shards": 2}).storage.table
    assert table == (((0, -1), (1, 0)),)
    assert PiKVConfig(storage={"placement": "xor", "n_tok": 8}).storage.n_tok == 8
    assert PiKVConfig(storage={"expert_ids": "gate", "gate_path": "gate.safetensors"}).storage.gate_path
    assert PiKVConfig(enabled=False, page_size=256).enabled is False


def test_parse_accepts_every_form(tmp_path):
    block = {"page_size": 16}
    alone, whole = tmp_path / "block.json", tmp_path / "ds_config.json"
    alone.write_text(json.dumps(block))
    whole.write_text(json.dumps({"train_batch_size": 1, "pikv": block}))
    made = PiKVConfig(**block)
    for source in (made, block, {"pikv": block}, {"pikv": made}, alone, str(alone), whole, str(whole)):
        assert PiKVConfig.parse(source) == made
    assert PiKVConfig.parse(None) == PiKVConfig()
    assert PiKVConfig.parse(made) is made


def test_parse_refuses_what_is_no_block(tmp_path):
    broken, twice = tmp_path / "broken.json", tmp_path / "twice.json"
    broken.write_text("{")
    twice.write_text('{"page_size": 1, "page_size": 2}')
    with pytest.raises(ConfigError, match="cannot read the configuration file .*absent.json"):
        PiKVConfig.parse(tmp_path / "absent.json")
    with pytest.raises(ConfigError, match="broken.json' is not valid JSON"):
        PiKVConfig.parse(broken)
    with pytest.raises(ConfigError, match="'page_size' appears twice"):
        PiKVConfig.parse(twice)
    with pytest.raises(ConfigError, match="pikv = True: legal is a JSON object"):
        PiKVConfig.parse({"pikv": True})
    with pytest.raises(ConfigError, match="keys are strings"):
        PiKVConfig.parse({1: 2})


def test_frozen_and_hashable():
    config = PiKVConfig()
    with pytest.raises(ValueError, match="frozen"):
        config.page_size = 3
    assert hash(config) == hash(PiKVConfig())


def test_round_trip_through_json():
    config = PiKVConfig(storage={"placement": "table", "table": [[[0], [1]]]})
    assert PiKVConfig.parse(json.loads(config.model_dump_json())) == config


def test_every_key_is_described_in_the_schema():
    schema = PiKVConfig.model_json_schema()
    for block in (schema, *schema["$defs"].values()):
        assert block["description"]
        for key, field in block["properties"].items():
            assert field.get("description") or "$ref" in field, f"{block['title']}.{key}"
    assert set(schema["properties"]) == set(DEFAULTS)


@pytest.mark.parametrize("block", [
    {"method": "int8", "k": {"method": "adaptive"}},
    {"method": "int8", "layers": {"0": {"method": "adaptive"}}},
    {"method": "adaptive", "v": {"method": "int8"}},
], ids=["k", "layer", "beside v"])  # fmt: skip
def test_two_pools_serve_keys_and_values_of_all_layers(block):
    with pytest.raises(ConfigError, match="another codec in pikv.compression"):
        PiKVConfig.parse({"compression": block})

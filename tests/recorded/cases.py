"""The recorded configurations, as data."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Case:
    """config: the "pikv" block. feed: what the host is given, see run() of host_hf, host_core, host_megatron.

    deleted: why this setting goes away. refused: what the error then says; until then the recorded outcome is what is expected.
    by_score: groups of facts (compare.py) that a rounding of the last bit can change, so that they are compared on the same CPU only.
    tolerance: of samples, on another CPU.
    """

    name: str
    host: Literal["hf", "core", "megatron"]
    world: int
    config: dict
    feed: dict = field(default_factory=dict)
    deleted: str | None = None
    refused: str | None = None
    by_score: tuple[str, ...] = ()
    tolerance: float = 1e-4
    short: bool = False  # part of what the test suite runs


def _block(page_size: int = 4, **blocks) -> dict:
    return {"page_size": page_size, "timeout_s": 60, **blocks}


_made: list[Case] = []


def _add(host: str, name: str, worlds: tuple[int, ...], config: dict, feed: dict, **options) -> None:
    """One case for every number of ranks."""
    _made.extend(Case(name=f"{host} {name} w{world}", host=host, world=world, config=config, feed=feed, **options) for world in worlds)


ONE, TWO, FOUR, ONE_TWO, ONE_FOUR, SEVERAL, ALL = (1,), (2,), (4,), (1, 2), (1, 4), (2, 4), (1, 2, 4)
SAME, OWN = {"requests": "replicated", "num_shards": 4}, {"requests": "distinct", "num_shards": 4}
FULL, BOTH, KINDS = ["full", "full"], ["full", "window"], ["full", "window", "latent"]
SCRIPT = [("prefill", [30, 17, 9, 22]), ("chunk", [7, 7, 4, 7]), ("decode", 1), ("chunk", [2, 5, 5, 1]), ("decode", 8)]
LONG = [("prefill", [70, 41, 9, 52]), ("decode", 5), ("chunk", [9, 5, 20, 9]), ("decode", 12)]
BIG = [("prefill", [330, 250, 180, 290]), ("decode", 5), ("chunk", [20, 9, 30, 40]), ("decode", 12)]
FORKS = [("prefill", [33, 21, 14, 30]), ("decode", 3), ("fork", [2, 0, 0, 1]), ("decode", 3), ("fork", [1, 1, 3, 3]), ("decode", 4)]
CROPS = [
    ("prefill", [26, 13]),
    ("hold", True),
    ("chunk", [5, 5]),
    ("crop", 3),
    ("chunk", [4, 4]),
    ("crop", 2),
    ("hold", False),
    ("decode", 9),
]
PINS = {"sink_tokens": 2, "recent_tokens": 5}
MOVES = FORKS[:4] + [
    ("hold", True),
    ("chunk", [9, 5, 5, 7]),
    ("crop", 3),
    ("chunk", [4, 4, 4, 4]),
    ("crop", 2),
    ("hold", False),
    ("decode", 9),
]
KEEP = {"sink_tokens": 2, "recent_tokens": 6, "budget_tokens": 32}
CROWDED = {"placement": "table", "table": [[[e % 4, -1] if e % 3 else [(e + 1) % 4, (e + 2) % 4] for e in range(8)]], "capacity_tokens": 76}


def _routed(method: str, **options) -> dict:
    return {"method": method, **PINS, **options}


def _pages(method: str, **options) -> dict:
    return _routed(method, budget_pages=5, **options)


def _evicted(method: str, **options) -> dict:
    return {"method": method, **KEEP, **options}


def _drive(layers: list[str], script: list) -> dict:
    return {"layers": layers, "script": script}


INT8, INT4 = ({"method": name, "group": 32} for name in ("int8", "int4"))
RAW_FP8 = {"method": "fp8_e4m3", "raw_sink_tokens": 2, "raw_recent_tokens": 6}
UNROTATED = {"method": "lora_plus", "rank": 16, "rope": "pre", "calibration": "FILE:calibration"}
# What a choice between two scores decides, see Case.by_score: what is read; what returns from other ranks; what is kept; with a model all
# that follows, as its tokens and the experts they choose.
READ = ("samples", "read")
RETURNED = (*READ, "numbers", "collectives")
KEPT = (*RETURNED, "kept")
FOLLOWING = (*KEPT, "tokens")
CODED = {"tolerance": 1e-3}  # a code may be rounded the other way: measured 9e-5 between kernels, what is exact differs by 3e-6

# ---- hosts and rows: transformers ----
_add("hf", "qwen3 ragged", ALL, _block(), {"batch": 3, "pads": (0, 5, 11)}, short=True)
_add("hf", "qwen3 distinct", FOUR, _block(storage=OWN), {})
_add("hf", "mixtral window", ONE, _block(), {"family": "mixtral", "pads": (0, 6)})
_add("hf", "mixtral window distinct, two generations", TWO, _block(storage=OWN), {"family": "mixtral", "generations": 2})
_add("hf", "gpt_oss window and sinks", ONE_TWO, _block(storage=SAME), {"family": "gpt_oss", "batch": 3, "pads": (0, 5, 11)})
_add("hf", "deepseek_v3", TWO, _block(storage=OWN), {"family": "deepseek_v3"})
_add("hf", "deepseek_v2", ONE_FOUR, _block(storage=SAME), {"family": "deepseek_v2"})
_add("hf", "qwen3 without experts", ONE, _block(), {"family": "qwen3_dense"})
_add("hf", "olmoe", TWO, _block(), {"family": "olmoe"})
_add("hf", "beams", ONE, _block(storage=SAME), {"num_beams": 4, "pads": (0, 3)}, short=True)
_add("hf", "beams window distinct", TWO, _block(storage=OWN), {"family": "mixtral", "num_beams": 3})
_add("hf", "beams evicted by heads", TWO, _block(2, storage=SAME, scheduling=_evicted("knorm", head_budget="uniform")),
     {"family": "qwen2_moe", "length": 50, "batch": 1, "num_beams": 3, "new_tokens": 16})  # fmt: skip
_add("hf", "assisted", ONE_TWO, _block(storage=SAME), {"batch": 1, "repeat": 2, "prompt_lookup_num_tokens": 4, "new_tokens": 20})
_add(
    "hf", "assisted window", ONE, _block(), {"family": "mixtral", "batch": 1, "repeat": 2, "prompt_lookup_num_tokens": 4, "new_tokens": 20}
)
_add("hf", "assisted evicted", TWO, _block(2, storage=SAME, scheduling=_evicted("streaming_llm")),
     {"length": 25, "batch": 1, "repeat": 2, "prompt_lookup_num_tokens": 4, "new_tokens": 20})  # fmt: skip
_add("hf", "chunked prefill", TWO, _block(storage=OWN), {"family": "mixtral", "chunks": 5, "pads": (0, 6)})

# ---- where entries go ----
_add("hf", "ids true", SEVERAL, _block(storage=OWN | {"expert_ids": "true"}), {})
_add("hf", "ids true replicated", TWO, _block(storage=SAME | {"expert_ids": "true"}), {"family": "deepseek_v3"}, short=True)
_add("hf", "ids hash", TWO, _block(storage=SAME | {"expert_ids": "hash"}), {})
_add("hf", "ids lookahead", TWO, _block(storage=OWN | {"expert_ids": "lookahead"}), {"family": "mixtral"})
_add("hf", "ids gate", ONE, _block(storage=SAME | {"expert_ids": "gate", "gate_path": "FILE:storage_gate"}), {})
_add("core", "placement xor", TWO, _block(storage=OWN | {"placement": "xor", "n_tok": 4}), _drive(KINDS, SCRIPT))
_add("core", "placement position", FOUR, _block(storage=SAME | {"placement": "position"}), _drive(KINDS, SCRIPT))
_add("core", "placement table, full shards spill", ONE_TWO, _block(storage=SAME | CROWDED),
     _drive(KINDS, LONG), short=True)  # fmt: skip
_add("core", "plain", ALL, _block(storage=SAME), _drive(KINDS, SCRIPT), short=True)
_add("core", "plain distinct", SEVERAL, _block(storage=OWN), _drive(KINDS, SCRIPT))
_add("core", "forks", ONE_FOUR, _block(storage=SAME), _drive(KINDS, FORKS))
_add("core", "crops", ONE_TWO, _block(storage=SAME), _drive(KINDS, CROPS))

# ---- codecs ----
_add("core", "int8", ONE_FOUR, _block(32, storage=SAME, compression=INT8), _drive(KINDS, BIG), **CODED)
_add("core", "int4", TWO, _block(32, storage=OWN, compression=INT4), _drive(KINDS, BIG), **CODED, short=True)
_add("core", "fp8", ONE, _block(storage=SAME, compression={"method": "fp8_e4m3"}), _drive(KINDS, FORKS), **CODED)
_add("core", "fp4", ONE, _block(32, storage=SAME, compression={"method": "fp4_e2m1"}), _drive(BOTH, LONG), **CODED)
_add("core", "int2", ONE, _block(32, compression={"method": "int2", "group": 32}), _drive(BOTH, LONG), **CODED)
_add("core", "k int8, v fp8", TWO, _block(32, storage=SAME, compression={"k": INT8, "v": {"method": "fp8_e4m3"}}),
     _drive(BOTH, BIG), **CODED)  # fmt: skip
_add("core", "rotated int4", ONE, _block(32, compression=INT4 | {"rotate": "hadamard"}), _drive(BOTH, LONG), **CODED)
_add("core", "codecs by layer", TWO, _block(32, storage=SAME, compression=INT8 | {"layers": {"1": {"method": "none"}}}),
     _drive(BOTH, BIG), **CODED)  # fmt: skip
_add("core", "raw window, int4", ONE_TWO, _block(32, compression=INT4 | {"raw_sink_tokens": 3, "raw_recent_tokens": 10}),
     _drive(KINDS, BIG), **CODED)  # fmt: skip
_add("core", "raw window, forks and crops", ONE, _block(compression={"method": "fp8_e4m3", "raw_sink_tokens": 2, "raw_recent_tokens": 6}),
     _drive(FULL, MOVES), **CODED)  # fmt: skip
_add("core", "adaptive", TWO, _block(storage=SAME, compression={"method": "adaptive", "light": "none", "heavy": "fp8_e4m3"}),
     _drive(FULL, LONG), by_score=KEPT, **CODED)  # fmt: skip
_add("hf", "int8", TWO, _block(32, storage={"requests": "distinct"}, compression=INT8), {"length": 90}, **CODED)
_add("hf", "deepseek_v3 int4", ONE, _block(32, compression=INT4), {"family": "deepseek_v3", "length": 90}, **CODED)
_add("hf", "lora", TWO, _block(compression={"method": "lora", "rank": 8, "calibration": "FILE:calibration"}), {}, short=True)
_add("hf", "lora_plus un-rotated", ONE_TWO,
     _block(storage=SAME, compression={"method": "lora_plus", "rank": 16, "rope": "pre", "calibration": "FILE:calibration"}),
     {"num_beams": 3, "pads": (0, 5)})  # fmt: skip
_add("hf", "svd", TWO, _block(storage=OWN, compression={"method": "svd", "rank": 8, "fit_tokens": 64}), {"new_tokens": 24})
_add("hf", "svd, raw window", ONE, _block(compression={"method": "svd", "rank": 8, "raw_sink_tokens": 2, "raw_recent_tokens": 5}),
     {"family": "gpt_oss", "new_tokens": 24})  # fmt: skip
_add("hf", "pyramid, v crop", ONE, _block(compression={"method": "pyramid", "rank": 16, "calibration": "FILE:calibration",
     "v": {"method": "crop", "rank": 8, "calibration": "FILE:calibration"}}), {})  # fmt: skip

# ---- what a query reads ----
_add("core", "bounds", ALL, _block(storage=SAME, routing=_pages("bounds")), _drive(BOTH, LONG), by_score=READ, short=True)
_add("core", "bounds distinct", SEVERAL, _block(storage=OWN, routing=_pages("bounds")), _drive(BOTH, LONG), by_score=READ)
_add("core", "bounds, what is needed", TWO, _block(storage=OWN, routing=_pages("bounds", exchange="needed")), _drive(BOTH, LONG),
     by_score=RETURNED)  # fmt: skip
_add("core", "centroids", TWO, _block(storage=SAME, routing=_pages("centroids", clusters=4)), _drive(BOTH, LONG), by_score=READ)
_add("core", "hash, what is needed", FOUR, _block(storage=OWN, routing=_routed("hash", top_k=2, exchange="needed")), _drive(BOTH, LONG))
_add("core", "topk", TWO, _block(storage=OWN, routing=_routed("topk", top_k=2)), _drive(BOTH, LONG), by_score=READ)
_add("core", "two_stage", TWO, _block(storage=SAME, routing=_routed("two_stage", top_k=1)), _drive(BOTH, LONG), by_score=READ)
_add("core", "hierarchical", ONE_TWO, _block(storage=SAME, routing=_pages("hierarchical")), _drive(BOTH, LONG), by_score=READ,
     deleted="bounds chooses better, and two_stage is the paper's R_H",
     refused="pikv.routing.method = 'hierarchical' was removed")  # fmt: skip
_add("core", "learned", TWO, _block(storage=SAME, routing=_routed("learned", top_k=2, path="FILE:router_gate")), _drive(BOTH, LONG),
     by_score=READ, deleted="a trained gate of pages took the place of the linear one", refused="pikv.routing.top_k = 2")  # fmt: skip
_add("core", "shuffle", ONE_TWO, _block(storage=SAME, routing=_pages("shuffle")), _drive(BOTH, FORKS), by_score=READ)
_add("core", "cache_aware", TWO, _block(storage=OWN, routing=_routed("cache_aware", top_k=2)), _drive(BOTH, LONG), by_score=READ)
_add("hf", "experts router, host penalty", TWO,
     _block(storage=SAME, routing=_routed("experts", host_penalty={"load": 0.5})), {"length": 40}, by_score=FOLLOWING)  # fmt: skip

# ---- what stays ----
_add("hf", "streaming_llm", ALL, _block(2, storage=SAME, scheduling=_evicted("streaming_llm")), {"family": "qwen2_moe", "length": 50},
     short=True)  # fmt: skip
_add("hf", "h2o distinct", SEVERAL, _block(2, storage=OWN, scheduling=_evicted("h2o")), {"family": "qwen2_moe", "length": 50},
     by_score=FOLLOWING)  # fmt: skip
_add("hf", "snapkv", ONE_TWO, _block(2, storage=SAME, scheduling=_evicted("snapkv")), {"length": 50}, by_score=FOLLOWING)
_add("hf", "kvzip", ONE, _block(2, storage=SAME, scheduling=_evicted("kvzip")), {"length": 50}, by_score=FOLLOWING)
_add("core", "quest", ALL, _block(storage=SAME, scheduling=_evicted("quest")), _drive(BOTH, LONG), by_score=KEPT)
_add("core", "tova distinct", TWO, _block(storage=OWN, scheduling=_evicted("tova", interval=4)), _drive(BOTH, LONG), by_score=KEPT)
_add("core", "tova of heads, adaptive", ONE_TWO, _block(storage=SAME, scheduling=_evicted("tova", head_budget="adaptive")),
     _drive(FULL, LONG), by_score=KEPT)  # fmt: skip
_add("core", "adakv, layers of a pyramid", TWO, _block(storage=SAME, scheduling=_evicted("adakv", layer_budget="pyramid")),
     _drive(FULL, LONG), by_score=KEPT)  # fmt: skip
_add("core", "single entries", ONE_TWO, _block(8, storage=SAME, scheduling=_evicted("h2o", granularity="token", interval=4)),
     _drive(BOTH, LONG), by_score=KEPT, deleted="entries leave page by page",
     refused="pikv.scheduling.granularity = 'token'")  # fmt: skip
_add("core", "single entries of heads", ONE,
     _block(8, storage=SAME, scheduling=_evicted("tova", granularity="token", head_budget="adaptive")),
     _drive(FULL, LONG), by_score=KEPT, deleted="entries leave page by page",
     refused="pikv.scheduling.granularity = 'token'")  # fmt: skip
_add("core", "forks, h2o", ONE_FOUR, _block(storage=SAME, scheduling=_evicted("h2o")), _drive(BOTH, LONG[:2] + FORKS[2:]), by_score=KEPT)

# ---- together ----
_add("core", "bounds, h2o, int8", ALL, _block(32, storage=SAME, compression=INT8, routing=_routed("bounds", budget_pages=6),
     scheduling=_evicted("h2o", budget_tokens=240)), _drive(BOTH, BIG), by_score=KEPT, **CODED)  # fmt: skip
_add("core", "bounds, quest, raw window, distinct", SEVERAL, _block(storage=OWN, compression=RAW_FP8, routing=_pages("bounds"),
     scheduling=_evicted("quest")), _drive(BOTH, LONG), by_score=KEPT, **CODED)  # fmt: skip
_add("core", "un-rotated, bounds, h2o", ONE_TWO, _block(storage=SAME, compression=UNROTATED, routing=_pages("bounds"),
     scheduling=_evicted("h2o")), _drive(BOTH, LONG), by_score=KEPT)  # fmt: skip
_add("core", "svd, bounds, quest", TWO, _block(storage=SAME, compression={"method": "svd", "rank": 8}, routing=_pages("bounds"),
     scheduling=_evicted("quest")), _drive(BOTH, LONG), by_score=KEPT)  # fmt: skip
_add("core", "raw window, tova, topk", ONE, _block(storage=SAME, compression=RAW_FP8, routing=_routed("topk", top_k=2),
     scheduling=_evicted("tova")), _drive(BOTH, LONG), by_score=KEPT, **CODED)  # fmt: skip
_add("hf", "bundled, int4, quest", ONE, _block(32, compression=INT4, scheduling={"method": "quest", "budget_ratio": 0.5}),
     {"family": "bundled", "length": 300, "batch": 1, "new_tokens": 8}, by_score=FOLLOWING, **CODED)  # fmt: skip
_add("hf", "bundled, bounds, h2o", TWO, _block(16, storage=OWN, routing={"method": "bounds", "budget_pages": 10},
     scheduling={"method": "h2o", "budget_ratio": 0.6}), {"family": "bundled", "length": 300, "batch": 1, "new_tokens": 8},
     by_score=FOLLOWING)  # fmt: skip

# ---- Megatron-Core ----
_add("megatron", "static", ONE, _block(), {"layout": (1, 1, 1), "pieces": (7, 5)})
_add("megatron", "static EP2", TWO, _block(storage={"requests": "distinct"}), {"layout": (1, 2, 1), "pieces": (7, 5)})
_add("megatron", "static TP2 EP2, ids true", TWO, _block(storage={"expert_ids": "true"}), {"layout": (2, 2, 1), "pieces": (7, 5)})
_add("megatron", "static TP2 EP2", FOUR, _block(), {"layout": (2, 2, 2), "pieces": (7, 5)})
_add("megatron", "latent EP2", TWO, _block(storage={"requests": "distinct"}), {"layout": (1, 2, 1), "pieces": (7, 5), "latent": True})
_add("megatron", "quest", ONE, _block(scheduling=_evicted("quest", budget_tokens=16)), {"layout": (1, 1, 1), "pieces": (7, 5)},
     by_score=FOLLOWING)  # fmt: skip
_add("megatron", "dynamic", ONE, _block(), {"layout": (1, 1, 1), "dynamic": {}})
_add(
    "megatron",
    "dynamic EP2, chunked, ids true",
    TWO,
    _block(storage={"expert_ids": "true"}),
    {"layout": (1, 2, 1), "dynamic": {"chunk": 24}},
)

CASES = {case.name: case for case in _made}
assert len(CASES) == len(_made), "a name is used twice"

"""The same runs with shards on other ranks. On every number of ranks four shards or as many as ranks."""

import torch
import torch.distributed as dist

from pikv_ds.cache import PiKVCache
from pikv_ds.config import PiKVConfig
from tests.dist.jobs.report import Report
from tests.recorded import cases, host_core
from tests.recorded.result import Result

PIECES = {
    "exact": {},
    "bounds": {"routing": {"method": "bounds", "budget_pages": 5, "sink_tokens": 2, "recent_tokens": 4}},
    "shards": {"routing": {"method": "topk", "top_k": 2, "sink_tokens": 2, "recent_tokens": 4}},
    "needed": {"routing": {"method": "bounds", "budget_pages": 5, "exchange": "needed", "sink_tokens": 2, "recent_tokens": 4}},
    "shards needed": {"routing": {"method": "hash", "top_k": 2, "exchange": "needed", "sink_tokens": 2, "recent_tokens": 4}},
    "h2o": {"scheduling": {"method": "h2o", "budget_tokens": 48, "sink_tokens": 2, "recent_tokens": 6}},
    "heads": {"scheduling": {"method": "tova", "budget_tokens": 48, "sink_tokens": 2, "recent_tokens": 6, "head_budget": "adaptive"}},
    "window": {"compression": {"method": "int8", "group": 32, "raw_sink_tokens": 2, "raw_recent_tokens": 16}, "page_size": 32},
    "adaptive": {"compression": {"method": "adaptive"}, "page_size": 64},
    "spill": {"storage": {"capacity_tokens": 75}},
}
ONLY_DISTINCT = ("needed", "shards needed")


def run(block: dict, layers: list[str], script: list, holders: tuple | None, group) -> tuple[Result, PiKVCache]:
    made = PiKVConfig(**{"page_size": 4} | block)
    specs = [host_core.spec(i, kind) for i, kind in enumerate(layers)]
    cache = PiKVCache(
        specs, made, num_experts=host_core.EXPERTS, dtype=torch.float32, device=torch.device("cpu"), group=group, holders=holders
    )
    played = host_core.Run(cache, made, group)
    result = played.play(script)
    return result, cache


def holders(world: int) -> dict[str, tuple]:
    """name -> map. "blocks": whole blocks change places; "mixed": shards of one rank are no neighbours."""
    if world == 2:
        return {"blocks": ((1,), (1,), (0,), (0,)), "mixed": ((1,), (0,), (0,), (1,))}
    return {"blocks": ((2,), (0,), (3,), (1,))}


def check(report: Report, name: str, requests: str, group) -> None:
    world = dist.get_world_size(group)
    block = dict(PIECES[name])
    block["storage"] = {"requests": requests, "num_shards": 4, **block.get("storage", {})}
    layers = ["full"] if name == "heads" else cases.BOTH
    script = cases.LONG if requests == "distinct" else cases.LONG + cases.FORKS  # FORKS are of four rows of a rank
    with report.check(f"{name} {requests}") as row:
        plain, _ = run(block, layers, script, None, group)
        for kind, where in holders(world).items():
            moved, cache = run(block, layers, script, where, group)
            assert cache.map.holders == where and len(plain.outputs) == len(moved.outputs) > 0
            worst = max(float((a.nan_to_num() - b.nan_to_num()).abs().max()) for a, b in zip(plain.outputs, moved.outputs, strict=True))
            if kind == "blocks":
                assert all(torch.equal(a, b) for a, b in zip(plain.outputs, moved.outputs, strict=True)), (kind, worst)
            assert worst <= 1e-5, (kind, worst)
            row[kind] = worst


def main() -> None:
    dist.init_process_group("gloo")
    report, group = Report(), dist.group.WORLD
    for name in PIECES:
        for requests in ("replicated", "distinct"):
            if requests == "distinct" or name not in ONLY_DISTINCT:
                check(report, name, requests, group)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""Runs in which shards change ranks between forwards, beside the same runs in which they stay. args: names of pieces, or none for all."""

import sys

import torch
import torch.distributed as dist

from pikv_ds.cache import PiKVCache
from pikv_ds.cache.inspect import CacheProbe
from pikv_ds.cache.stats import stats
from pikv_ds.config import PiKVConfig
from tests.dist.jobs.report import Report
from tests.harness.invariants import check_pages
from tests.long_form import LONG
from tests.migration.moving import contents
from tests.recorded import cases, host_core

KEEP = {"sink_tokens": 2, "recent_tokens": 6}
RAW = {"raw_sink_tokens": 2, "raw_recent_tokens": 16}
PIECES = {
    "exact": {},
    "int4": {"compression": {"method": "int4", "group": 32}, "page_size": 32},
    "window": {"compression": {"method": "int8", "group": 32, **RAW}, "page_size": 32},
    "h2o": {"scheduling": {"method": "h2o", "budget_tokens": 48, **KEEP}},
    "bounds": {"routing": {"method": "bounds", "budget_pages": 5, "sink_tokens": 2, "recent_tokens": 4}},
    "heads": {"scheduling": {"method": "tova", "budget_tokens": 48, **KEEP, "head_budget": "adaptive"}},
    "shards": {"routing": {"method": "topk", "top_k": 2, "sink_tokens": 2, "recent_tokens": 4}},
    "misses": {"routing": {"method": "cache_aware", "top_k": 2, "sink_tokens": 2, "recent_tokens": 4}},
    "centroids": {"routing": {"method": "centroids", "budget_pages": 5, "sink_tokens": 2, "recent_tokens": 4}},
    "adaptive": {"compression": {"method": "adaptive"}, "page_size": 64},
    "svd": {"compression": {"method": "svd", "rank": 8}},
    "hit rate": {"scheduling": {"method": "adakv", "budget_tokens": 48, **KEEP}},
    "queries": {"scheduling": {"method": "snapkv", "budget_tokens": 48, **KEEP}},
    "late": {"storage": {"expert_ids": "true"}},
    "spill": {"storage": {"capacity_tokens": 75}},
}
# "blocks": shards of one rank stay together, so that partial sums have the same members; "mixed": they do not.
MAPS = {
    2: {"blocks": ((1,), (1,), (0,), (0,)), "home": ((0,), (0,), (1,), (1,)), "mixed": ((1,), (0,), (0,), (1,))},
    4: {"blocks": ((2,), (0,), (3,), (1,)), "home": ((0,), (1,), (2,), (3,)), "mixed": ((3,), (2,), (0,), (1,))},
}
SCRIPTS = {
    "at once": lambda other: [
        ("prefill", [70, 41, 9, 52]), ("move", other), ("decode", 3), ("move", "home"), ("chunk", [9, 5, 20, 9]), ("move", other),
        ("decode", 6),
    ],
    "ahead": lambda other: [
        ("prefill", [70, 41, 9, 52]), ("ahead", other), ("decode", 5), ("chunk", [9, 5, 20, 9]), ("decode", 14), ("arrived", other),
        ("decode", 2),
    ],
    "forks": lambda other: [
        ("prefill", [33, 21, 14, 30]), ("decode", 2), ("fork", [2, 0, 0, 1]), ("decode", 2), ("move", other), ("decode", 2),
        ("fork", [1, 1, 3, 3]), ("ahead", "home"), ("decode", 4), ("fork", [0, 2, 2, 1]), ("decode", 9), ("arrived", "home"),
    ],
}  # fmt: skip


# In the short form, what other pieces check as well.
SKIPPED = {("mixed", "at once", "window"), ("mixed", "at once", "h2o"), ("blocks", "forks", "exact"), ("blocks", "forks", "bounds"),
           ("blocks", "at once", "bounds"), ("blocks", "at once", "window")}  # fmt: skip


class Moving(host_core.Run):
    """stays: shards stay where they are."""

    stays = False

    def move(self, to: str) -> None:
        if not self.stays:
            self.cache.rebalance(MAPS[self.size][to])
            assert self.cache.map.holders == MAPS[self.size][to]
            self._check()

    def ahead(self, to: str) -> None:
        if not self.stays:
            self.cache.rebalance(MAPS[self.size][to], bytes_per_step=4096)
            assert self.cache.map.holders != MAPS[self.size][to]

    def arrived(self, to: str) -> None:
        if not self.stays:
            assert self.cache.map.holders == MAPS[self.size][to] and self.cache.migration.wanted is None
            self._check()

    def _check(self) -> None:
        for pool in CacheProbe(self.cache).all_pools:
            check_pages(pool)


def run(block: dict, layers: list[str], script: list, group, *, stays: bool) -> tuple[list, PiKVCache]:
    made = PiKVConfig(**{"page_size": 4} | block)
    specs = [host_core.spec(i, kind) for i, kind in enumerate(layers)]
    cache = PiKVCache(specs, made, num_experts=host_core.EXPERTS, dtype=torch.float32, device=torch.device("cpu"), group=group)
    played = Moving(cache, made, group)
    played.stays = stays
    for what, argument in script:
        getattr(played, what)(argument)
    return played.outputs, cache


def contents_of_all(cache: PiKVCache, *, numbers: bool) -> dict:
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, contents(cache, numbers=numbers))
    return {key: value for of_rank in everywhere for key, value in of_rank.items()}


def conserved(cache: PiKVCache) -> None:
    names = ("appended", "forked", "live", "expired", "evicted", "cropped")
    said = stats(cache, 1, 1)
    total = torch.tensor([said[f"entries_{name}"] for name in names])
    dist.all_reduce(total)
    appended, forked, *rest = total.tolist()
    assert appended + forked == sum(rest), dict(zip(names, total.tolist(), strict=True))


def check(report: Report, name: str, requests: str, group) -> None:
    world = dist.get_world_size(group)
    block = dict(PIECES[name])
    block["storage"] = {"requests": requests, "num_shards": 4, **block.get("storage", {})}
    layers = ["full"] if name == "heads" else ["full", "window", "latent"] if name == "exact" else cases.BOTH
    with report.check(f"{name} {requests}") as row:
        for script in SCRIPTS:
            if script == "forks" and (requests == "distinct" or name == "svd"):
                continue  # forks are of four rows of a rank
            for other in ("blocks", "mixed"):
                if other == "mixed" and (world == 4 or script != "at once"):
                    continue
                if not LONG and (other, script, name) in SKIPPED:
                    continue
                plain, stayed = run(block, layers, SCRIPTS[script](other), group, stays=True)
                moved, cache = run(block, layers, SCRIPTS[script](other), group, stays=False)
                assert len(plain) == len(moved) > 0
                worst = max(float((a.nan_to_num() - b.nan_to_num()).abs().max()) for a, b in zip(plain, moved, strict=True))
                if other == "blocks":
                    assert all(torch.equal(a, b) for a, b in zip(plain, moved, strict=True)), (script, worst)
                assert worst <= 1e-5, (script, other, worst)
                numbers = other == "blocks"
                assert contents_of_all(stayed, numbers=numbers) == contents_of_all(cache, numbers=numbers), (script, other)
                conserved(cache)
                done = cache.migration.progress
                assert done.committed == done.started == sum(what in ("move", "ahead") for what, _ in SCRIPTS[script](other)), done
                row[f"{script} {other}"] = {"worst": worst, "sent": done.bytes_sent, "ahead": done.bytes_ahead, "again": done.bytes_again}


def main() -> None:
    dist.init_process_group("gloo")
    report, group = Report(), dist.group.WORLD
    for name in sys.argv[1:] or PIECES:
        for requests in ("replicated", "distinct"):
            check(report, name, requests, group)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

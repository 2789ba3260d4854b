"""Run by test_evict.py in a process of its own: a long prompt, then one eviction. Prints as JSON what was allocated and what was resident.

Inside a test session the resident memory also holds what other tests have left behind, and moves with it.
"""

import argparse
import json
import os
from pathlib import Path

import torch

from pikv_ds.cache.cache import PiKVCache
from pikv_ds.cache.stats import stats
from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.spec import LayerSpec
from pikv_ds.step.step import LocalStep

NUM_TOKENS = 24_576


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def sizes(cache: PiKVCache) -> dict[str, int]:
    return {"allocated": stats(cache, 1, 1)["kv_bytes_allocated"], "resident": resident_bytes()}


def main(head_budget: str, num_shards: int) -> None:
    torch.use_deterministic_algorithms(True)  # fills what is allocated, so that all of it is resident
    spec = [LayerSpec(layer_idx=i, num_kv_heads=4, k_dim=64, v_dim=64) for i in range(2)]
    scheduling = {"method": "streaming_llm", "budget_ratio": 0.125, "prefill": "keep"}
    config = PiKVConfig(page_size=16, scheduling=scheduling | {"head_budget": head_budget}, storage={"num_shards": num_shards})
    cache = PiKVCache(spec, config, num_experts=1, dtype=torch.float32, device=torch.device("cpu"))

    def forward(before: int, columns: int) -> None:
        positions = torch.arange(before, before + columns, dtype=torch.int32).unsqueeze(0)
        row = {"num_new": [columns], "parent": [0 if before else -1], "keep": [before], "identity": before > 0, "fresh": before == 0}
        cache.begin_step(LocalStep(num_rows=1, num_columns=columns, positions=positions, digest=0, **row))
        for i in range(2):
            q, k, v = (torch.zeros(1, columns, 4, 64) for _ in range(3))
            cache.attend(i, q, k, v, scale=1.0, v_dim=64, expert_ids=None)
        cache.end_step()

    forward(0, NUM_TOKENS)
    full = sizes(cache)
    forward(NUM_TOKENS, 1)
    print(json.dumps({"full": full, "left": sizes(cache)}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("head_budget")
    parser.add_argument("num_shards", type=int)
    main(**vars(parser.parse_args()))

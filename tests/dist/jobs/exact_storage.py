"""Placements, expert id sources and shard counts: the same tokens wherever entries live. 1, 2 and 4 ranks. args: out file of the gate."""

import itertools
import sys

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from tests.dist.jobs.exact import assert_conserved, assert_same, generate, generate_sharded
from tests.dist.jobs.report import Report
from tests.long_form import short_or_long
from tests.tiny_models import prompt, tiny_model

NAMES = ("qwen3_moe", "mixtral", "deepseek_v3")
SOURCES = ("previous_layer", "lookahead", "true", "gate", "hash")
PLACEMENTS = {
    "experts": {},
    "xor": {"n_tok": 4},
    "position": {},
    "table": {"table": [[[e % 4, -1] if e % 3 else [(e + 1) % 4, (e + 2) % 4] for e in range(8)]]},
}


def storage_cases(name: str, world: int) -> list[tuple[str, str]]:
    """(source of expert ids, placement). A placement sees ids, not where they came from.

    Short: on 1 and 2 ranks every source with every family, as each has a router of its own, and every placement with the first; on 4,
    where nothing but the number of ranks is new, the first family, and of the latent one what is compared over ranks.
    """
    whole = [(s, p) for s, p in itertools.product(SOURCES, PLACEMENTS) if p == "experts" or s in ("previous_layer", "true")]
    by_experts = [(source, "experts") for source in SOURCES]
    if name == "qwen3_moe":
        return whole
    if world < 4:
        return short_or_long(by_experts, whole)
    return short_or_long(by_experts[:1] if name == "deepseek_v3" else [], whole)


def main() -> None:
    report = Report()
    dist.init_process_group("gloo")
    group = dist.new_group()
    rank = dist.get_rank()
    gate_path = f"{sys.argv[1]}.{rank}"
    models = {name: tiny_model(name) for name in NAMES}
    for name, model in models.items():
        cases = storage_cases(name, dist.get_world_size())
        if not cases:
            continue
        config = model.config
        width = config.kv_lora_rank + config.qk_rope_head_dim if name == "deepseek_v3" else 2 * 16
        same = prompt(19, seed=3, batch=2)
        own = prompt(11 + 6 * rank, seed=30 + rank, batch=1)
        references = {"replicated": generate(model, same, new_tokens=16), "distinct": generate(model, own, new_tokens=16)}
        save_file({"gate": torch.randn(2, 8, width, generator=torch.Generator().manual_seed(5))}, gate_path)
        for source, placement in cases:
            storage = {"num_shards": 4, "expert_ids": source, "placement": placement, **PLACEMENTS[placement]}
            if source == "gate":
                storage["gate_path"] = gate_path
            for requests, ids in (("replicated", same), ("distinct", own)):
                with report.check(f"{name} {source} {placement} {requests}") as row:
                    run = generate_sharded(
                        model, ids, new_tokens=16, group=group, config={"page_size": 4, "storage": {**storage, "requests": requests}}
                    )
                    assert_same(run, references[requests], 1e-5)
                    assert_conserved(run.stats, group)
                    row["load_per_expert"] = run.stats["load_per_expert"]
                    row["load_per_rank"] = run.stats["load_per_rank"]
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

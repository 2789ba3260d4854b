"""Eviction over process groups: what is kept, on 1, 2 and 4 ranks with four shards. args: methods."""

import sys
import tempfile
from pathlib import Path

import torch.distributed as dist

import pikv_ds
from pikv_ds.adapters.hf_cache import HFCache
from pikv_ds.errors import ConfigError
from tests.dist.jobs.exact import assert_conserved, generate, generate_sharded
from tests.dist.jobs.report import Report
from tests.retention_blocks import needed
from tests.tiny_models import prompt, tiny_model
from tests.unit.invariants import slots_of

STORAGE = {"num_shards": 4, "requests": "replicated"}
FOLDER = tempfile.TemporaryDirectory()
SCHEDULING = {"budget_tokens": 40, "sink_tokens": 2, "recent_tokens": 6}
HEAD_METHODS, TOKEN_METHODS = ["knorm", "tova"], ["knorm", "snapkv", "h2o"]


def geometry(model) -> dict:
    config = model.config
    width = 2 * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    return {"layers": config.num_hidden_layers, "heads": config.num_key_value_heads, "width": width}


def kept(cache: HFCache) -> list[list[list[list[int]]]]:
    """[layer][row][table] positions held, of this rank's tables: shards, or shard * heads + head."""
    tables = cache.core.tables
    return [
        [
            [store.positions.flatten()[slots_of(store, row, shard).long()].tolist() for shard in range(store.counts.shape[1])]
            for row in range(tables.counts.shape[1])
        ]
        for store in tables.stores
    ]


def held(
    model,
    ids,
    group,
    method: str,
    *,
    waiting: int = 0,
    requests: str = "replicated",
    page_size: int = 2,
    scheduling: dict | None = None,
    **options,
) -> dict:
    """A run's tokens, the entries it kept in every table, its collectives. waiting: entries that may be there beyond the budget."""
    scheduling = {"method": method, **SCHEDULING, **(scheduling or {})}
    scheduling |= needed(method, Path(FOLDER.name), **geometry(model))
    block = {"page_size": page_size, "storage": {**STORAGE, "requests": requests}, "scheduling": scheduling}
    with pikv_ds.attach(model, block, group) as cache:
        run = generate(model, ids, new_tokens=24, **options)
        stats, own, load, heads = cache.stats(), kept(cache), cache.core.tables.directory.load.tolist(), cache.core.tables.heads
        evicted, lens = cache.core.tables.directory.evicted_by_head(), cache.core.agreement.lens
        allocated = [store.num_pages for store in cache.core.tables.stores]
    assert_conserved(stats, group)
    ranks = [None] * dist.get_world_size(group)
    dist.all_gather_object(ranks, own, group=group)
    whole = [[sum((rank[layer][row] for rank in ranks), []) for row in range(len(own[0]))] for layer in range(len(own))]
    for layer, rows in enumerate(whole):
        assert load[layer] == [sum(len(table) for row in rows for table in row[s * heads : (s + 1) * heads]) for s in range(4)]
        budget = heads * (scheduling["budget_tokens"] + waiting)
        assert all(sum(map(len, row)) <= budget for row in rows), "over the budget"
        for row, tables in enumerate(rows):
            for head in range(heads):
                live = sum(map(len, tables[head::heads]))
                gone = evicted[layer][row][head]
                assert (waiting and requests == "replicated") or live + gone == lens[row], f"layer {layer}, row {row}, head {head}: {gone}"
        pages = sum(-(-len(table) // page_size) for row in own[layer] for table in row)
        assert allocated[layer] <= 1.25 * pages + 1, f"layer {layer}: {allocated[layer]} pages for the {pages} that are in use"
    return {"tokens": run.tokens.tolist(), "kept": whole, "collectives": stats["exchange_collectives"]}


def main() -> None:
    report = Report()
    dist.init_process_group("gloo")
    group = dist.new_group()
    model = tiny_model("qwen2_moe")  # no norm on its keys: after one, all keys are about equally long and "knorm" a matter of rounding
    ids = prompt(70, seed=3, batch=2)
    exact = generate_sharded(model, ids, new_tokens=24, group=group, config={"page_size": 2, "storage": STORAGE})
    for method in sys.argv[1:]:
        with report.check(method) as row:
            row |= held(model, ids, group, method)
            row["collectives"] -= exact.stats["exchange_collectives"]
    with report.check("beams") as row:
        row |= held(model, prompt(50, seed=4, batch=1), group, "streaming_llm", num_beams=3)
    with report.check("assisted") as row:
        row |= held(model, prompt(25, seed=5).repeat(1, 2), group, "streaming_llm", prompt_lookup_num_tokens=4, waiting=5)
    for head_budget in ("uniform", "adaptive"):
        for method in HEAD_METHODS:
            with report.check(f"{method} {head_budget} heads") as row:
                row |= held(model, ids, group, method, scheduling={"head_budget": head_budget})
    for method in TOKEN_METHODS:
        with report.check(f"{method} entries") as row:
            row |= held(model, ids, group, method, page_size=8, scheduling={"granularity": "token"})
    with report.check("entries of heads") as row:
        row |= held(model, ids, group, "tova", page_size=8, scheduling={"granularity": "token", "head_budget": "adaptive"})
    with report.check("entries of beams") as row:
        beams = {"scheduling": {"granularity": "token", "head_budget": "uniform"}, "num_beams": 3}
        row |= held(model, prompt(50, seed=4, batch=1), group, "knorm", page_size=8, **beams)
    with report.check("beams of heads") as row:
        row |= held(model, prompt(50, seed=4, batch=1), group, "knorm", scheduling={"head_budget": "uniform"}, num_beams=3)
    with report.check("distinct, by head"):
        own = prompt(40 + 10 * report.rank, seed=6 + report.rank, batch=1)
        held(model, own, group, "knorm", requests="distinct", scheduling={"head_budget": "adaptive"})
    with report.check("distinct, entries"):
        held(model, own, group, "knorm", requests="distinct", page_size=8, scheduling={"granularity": "token", "interval": 4}, waiting=3)
    with report.check("distinct"):
        own = prompt(40 + 10 * report.rank, seed=6 + report.rank, batch=1)
        held(model, own, group, "streaming_llm", requests="distinct")
    with report.check("distinct, by attention"):
        if dist.get_world_size() > 1:
            try:
                held(model, own, group, "h2o", requests="distinct")
            except ConfigError as error:
                assert "'h2o' with distinct requests" in str(error), error
            else:
                raise AssertionError("h2o measured attention of requests that it does not see")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

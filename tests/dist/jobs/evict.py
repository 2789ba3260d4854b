"""Eviction over process groups: what is kept, on 1, 2 and 4 ranks with four shards. args: methods."""

import sys

import torch
import torch.distributed as dist

import pikv_ds
from pikv_ds.adapters.hf_cache import HFCache
from pikv_ds.stats import decode_bytes_sent
from tests.dist.jobs.exact import assert_conserved, counted_collectives, generate, generate_sharded
from tests.dist.jobs.report import Report
from tests.tiny_models import prompt, tiny_model
from tests.unit.invariants import slots_of

STORAGE = {"num_shards": 4, "requests": "replicated"}
DISTINCT = [("h2o", "all"), ("quest", "all"), ("snapkv", "all"), ("adakv", "all"), ("h2o", "bounds"), ("quest", "hash")]  # policy, router
ROUTING = {
    "bounds": {"budget_pages": 12, "sink_tokens": 2, "recent_tokens": 4},
    "hash": {"top_k": 2, "sink_tokens": 2, "recent_tokens": 4},
}
ROOMY = {"capacity_tokens": 1000}  # no shard is ever full: where entries go does not depend on other requests
SCHEDULING = {"budget_tokens": 40, "sink_tokens": 2, "recent_tokens": 6}


def kept(cache: HFCache) -> list[list[list[list[int]]]]:
    """[layer][row][shard] positions held, of this rank's shards."""
    tables = cache.core.tables
    return [
        [
            [store.positions.flatten()[slots_of(store, row, shard).long()].tolist() for shard in range(tables.num_local)]
            for row in range(tables.counts.shape[1])
        ]
        for store in tables.stores
    ]


def held(
    model, ids, group, method: str, *, waiting: int = 0, requests: str = "replicated", storage: dict | None = None, routing: dict | None = None,
    **options,
) -> dict:  # fmt: skip
    """A run's tokens, the entries it kept in every shard, its collectives. waiting: entries that a crop may still take back."""
    block = {"page_size": 2, "storage": {**STORAGE, "requests": requests, **(storage or {})}, "routing": routing or {}}
    block["scheduling"] = {"method": method, **SCHEDULING}
    with pikv_ds.attach(model, block, group) as cache:
        run = generate(model, ids, new_tokens=24, **options)
        stats, own, load = cache.stats(), kept(cache), cache.core.tables.directory.load.tolist()
    assert_conserved(stats, group)
    ranks = [own]
    if group is not None:
        ranks = [None] * dist.get_world_size(group)
        dist.all_gather_object(ranks, own, group=group)
    whole = [[sum((rank[layer][row] for rank in ranks), []) for row in range(len(own[0]))] for layer in range(len(own))]
    for layer, rows in enumerate(whole):
        assert load[layer] == [sum(len(row[shard]) for row in rows) for shard in range(4)], "the directory lost count"
        assert all(sum(map(len, row)) <= 40 + waiting for row in rows), "over the budget"
    return {"tokens": run.tokens.tolist(), "kept": whole, "collectives": stats["exchange_collectives"]}


def check_collectives(model, group, row: dict) -> None:
    """Distinct requests: two collectives per layer and one that carries the last layer's lse; bytes as the formula says."""
    rank, size = dist.get_rank(), dist.get_world_size()
    block = {"page_size": 2, "storage": {**STORAGE, "requests": "distinct"}, "scheduling": {"method": "h2o", "budget_ratio": 1.0}}
    with pikv_ds.attach(model, block, group) as cache, torch.no_grad():
        token = model(prompt(30, seed=rank, batch=1 + rank), past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
        sent = cache.stats()["exchange_bytes_sent"]
        with counted_collectives() as calls:
            model(token, past_key_values=cache)
        sent, layers = cache.stats()["exchange_bytes_sent"] - sent, cache.core.layers
    rows = [1 + r for r in range(size)]
    formula = decode_bytes_sent("distinct", rows, rank, model.config.num_attention_heads, layers, 4, watched=[True] * len(layers))
    row |= {"collectives": len(calls), "bytes": sent, "layers": len(layers)}
    if size > 1:
        assert len(calls) == 2 * len(layers) + 1, calls
        assert sent == formula == sum(num_bytes for _, num_bytes in calls), (sent, formula, calls)


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
    with report.check("distinct"):
        own = prompt(40 + 10 * report.rank, seed=6 + report.rank, batch=1)
        held(model, own, group, "streaming_llm", requests="distinct")
    rank = report.rank
    for method, router in DISTINCT if dist.get_world_size() > 1 else ():
        with report.check(f"distinct, {method}, {router}") as row:
            options = {"storage": ROOMY, "routing": {"method": router} | ROUTING.get(router, {})}
            several = held(model, own, group, method, requests="distinct", **options)
            alone = held(model, own, None, method, requests="auto", **options)
            assert several["tokens"] == alone["tokens"]
            assert [rows[rank : rank + 1] for rows in several["kept"]] == alone["kept"], "another choice than alone"
            row |= {"entries": sum(map(len, alone["kept"][0][0]))}
    for router, options in ROUTING.items():
        with report.check(f"h2o with {router}") as row:
            row |= held(model, ids, group, "h2o", routing={"method": router, **options})
    with report.check("collectives of a step, by attention") as row:
        check_collectives(model, group, row)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

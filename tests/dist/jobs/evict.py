"""Eviction over process groups: what is kept, on 1, 2 and 4 ranks with four shards. args: methods."""

import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

import pikv_ds
from pikv_ds.adapters.hf.cache import HFCache
from pikv_ds.cache.inspect import CacheProbe
from pikv_ds.cache.stats import decode_bytes_sent
from tests.dist.jobs.exact import assert_conserved, counted_collectives, generate, generate_sharded
from tests.dist.jobs.report import Report
from tests.held import check_bytes
from tests.long_form import short_or_long
from tests.retention_blocks import needed
from tests.tiny_models import fingerprint, prompt, tiny_model

STORAGE = {"num_shards": 4, "requests": "replicated"}
ROUTING = {
    "bounds": {"budget_pages": 12, "sink_tokens": 2, "recent_tokens": 4},
    "hash": {"top_k": 2, "sink_tokens": 2, "recent_tokens": 4},
}
ROOMY = {"capacity_tokens": 1000}  # no shard is ever full: where entries go does not depend on other requests
ONES = {"page_size": 1, "scheduling": {"interval": 4}, "waiting": 3}  # the budget is kept to the entry
FOLDER = tempfile.TemporaryDirectory()
SCHEDULING = {"budget_tokens": 40, "sink_tokens": 2, "recent_tokens": 6}
SVD = {"compression": {"method": "svd", "rank": 16}, "scheduling": {"budget_tokens": 24}}  # short prompts double while they are decoded
HEAD_METHODS, ONE_METHODS = ["knorm", "tova"], ["snapkv", "h2o"]


def distinct_cases(world: int) -> list[tuple[str, str]]:
    """(policy, router, or "ones" with pages of one entry). Short, on 4 ranks: one of each kind, all of them are run on 2."""
    whole = [("h2o", "all"), ("quest", "all"), ("snapkv", "all"), ("adakv", "all"), ("h2o", "bounds"), ("quest", "hash")]
    whole += [("knorm", "ones"), ("h2o", "ones")]
    return whole if world < 4 else short_or_long([("adakv", "all"), ("h2o", "bounds"), ("h2o", "ones")], whole)


def geometry(model) -> dict:
    config = model.config
    width = 2 * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    return {
        "layers": config.num_hidden_layers, "heads": config.num_key_value_heads, "width": width, "fingerprint": fingerprint(model)
    }  # fmt: skip


def kept(cache: HFCache) -> list[list[list[list[int]]]]:
    """[layer][row][table] positions held, of this rank's tables: shards, or shard * heads + head."""
    probe = CacheProbe(cache.core)
    return [probe.near_pool(layer).held for layer in range(probe.num_layers)]


def held(
    model, ids, group, method: str, *, waiting: int = 0, requests: str = "replicated", scheduling: dict | None = None,
    storage: dict | None = None, routing: dict | None = None, compression: dict | None = None, page_size: int = 2, **options,
) -> dict:  # fmt: skip
    """A run's tokens, the entries it kept in every table, its collectives. waiting: entries that may be there beyond the budget."""
    scheduling = {"method": method, **SCHEDULING, **(scheduling or {})}
    scheduling |= needed(method, Path(FOLDER.name), **geometry(model))
    block = {"page_size": page_size, "storage": {**STORAGE, "requests": requests, **(storage or {})}, "routing": routing or {}}
    block |= {"scheduling": scheduling, "compression": compression or {}}
    with pikv_ds.attach(model, block, group) as cache:
        run = generate(model, ids, new_tokens=24, **options)
        stats, own, probe = cache.stats(), kept(cache), CacheProbe(cache.core)
        load, heads, evicted, lens = probe.loads.tolist(), probe.heads, probe.evicted, probe.lens
        allocated = [pool.num_pages for pool in probe.all_pools]
        check_bytes(cache.core)
    assert_conserved(stats, group)
    ranks = [own]
    if group is not None:
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
    for head_budget in ("uniform", "adaptive"):
        for method in HEAD_METHODS:
            with report.check(f"{method} {head_budget} heads") as row:
                row |= held(model, ids, group, method, scheduling={"head_budget": head_budget})
    for method in ONE_METHODS:
        with report.check(f"{method} ones") as row:
            row |= held(model, ids, group, method, page_size=1)
    with report.check("beams of heads") as row:
        row |= held(model, prompt(50, seed=4, batch=1), group, "knorm", scheduling={"head_budget": "uniform"}, num_beams=3)
    for name, more in (("quest svd", {}), ("quest svd heads", {"head_budget": "uniform"})):
        with report.check(name) as row:
            options = SVD | {"scheduling": SVD["scheduling"] | more}
            row |= held(model, prompt(22, seed=3, batch=2), group, "quest", **options)
    with report.check("distinct, by head"):
        own = prompt(40 + 10 * report.rank, seed=6 + report.rank, batch=1)
        held(model, own, group, "knorm", requests="distinct", scheduling={"head_budget": "adaptive"})
    with report.check("distinct"):
        own = prompt(40 + 10 * report.rank, seed=6 + report.rank, batch=1)
        held(model, own, group, "streaming_llm", requests="distinct")
    rank = report.rank
    own = prompt(40 + 10 * report.rank, seed=6 + report.rank, batch=1)
    if dist.get_world_size() > 1:
        with report.check("distinct, quest svd"):
            short, options = prompt(20 + 2 * rank, seed=6 + rank, batch=1), SVD | {"storage": ROOMY}
            several = held(model, short, group, "quest", requests="distinct", **options)
            alone = held(model, short, None, "quest", requests="auto", **options)
            assert several["tokens"] == alone["tokens"]
            assert [rows[rank : rank + 1] for rows in several["kept"]] == alone["kept"], "another choice than alone"
    for method, how in distinct_cases(dist.get_world_size()) if dist.get_world_size() > 1 else ():
        with report.check(f"distinct, {method}, {how}") as row:
            router, ones = ("all", ONES) if how == "ones" else (how, {})
            options = {"storage": ROOMY, "routing": {"method": router} | ROUTING.get(router, {}), **ones}
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

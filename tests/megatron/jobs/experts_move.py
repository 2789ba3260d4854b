"""Experts, routers' rows and entries change ranks together, beside runs in which all stay. Arguments: layouts tp,ep,etp."""

import sys
from functools import partial, partialmethod

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from pikv_ds.cache.inspect import CacheProbe
from pikv_ds.errors import MigrationError, UnsupportedError
from pikv_ds.megatron_patch import PiKVInferenceContext, disable_pikv, enable_pikv
from pikv_ds.migration.experts import Experts
from tests.dist.jobs.report import Report
from tests.megatron.layouts import each_layout
from tests.megatron.models import local_spec, tiny_config, tiny_model, tokens
from tests.megatron.runs import assert_conserved, full_forward, refused, step

MAPS = {
    2: {"blocks": ((1,), (1,), (0,), (0,)), "mixed": ((1,), (0,), (0,), (1,)), "home": ((0,), (0,), (1,), (1,))},
    4: {"blocks": ((2,), (0,), (3,), (1,)), "mixed": ((2,), (0,), (3,), (1,)), "home": ((0,), (1,), (2,), (3,))},
}
BIASES = dict(add_bias_linear=True, moe_router_enable_expert_bias=True, moe_router_score_function="sigmoid")
LENGTH, PROMPT = 34, 16


def generation(model, ids, moves: dict, **options) -> tuple[torch.Tensor, PiKVInferenceContext]:
    """Logits of every forward; before forward i shards move to moves[i]."""
    context, logits, done = PiKVInferenceContext(len(ids), LENGTH, model=model), [], 0
    with torch.no_grad():
        for i, columns in enumerate([PROMPT] + [1] * (LENGTH - PROMPT)):
            if i in moves:
                assert context.rebalance(moves[i], **options)
            logits.append(step(model, context, ids[:, done : done + columns]))
            done += columns
    return torch.stack(logits), context


def weights_of_experts(model) -> dict[int, dict[str, torch.Tensor]]:
    """By number, wherever they lie; of this rank."""
    found: dict[int, dict[str, torch.Tensor]] = {}
    for i, layer in enumerate(model.decoder.layers):
        experts = layer.mlp.experts
        first = dist.get_rank(parallel_state.get_expert_model_parallel_group()) * len(experts.local_experts)
        for j, expert in enumerate(experts.local_experts):
            number = getattr(expert, "pikv_expert", first + j)
            found.setdefault(number, {}).update({f"{i}.{name}": x.detach().clone() for name, x in expert.named_parameters()})
    return found


def of_all(found: dict) -> dict:
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, found)
    return {key: value for one in everywhere for key, value in one.items()}


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(a[k].keys() == b[k].keys() and all(torch.equal(a[k][n], b[k][n]) for n in a[k]) for k in a)


def check_generation(report: Report, layout: str, requests: str, source: str, changes: dict) -> None:
    config = tiny_config(**changes)
    with report.check(f"{layout} {requests} {source}{' biases' if changes else ''}") as row:
        model = enable_pikv(tiny_model(config), {"storage": {"requests": requests, "num_shards": 4, "expert_ids": source}, "page_size": 4})
        for layer in model.decoder.layers:
            if layer.mlp.router.expert_bias is not None:
                layer.mlp.router.expert_bias.normal_(0, 0.1, generator=torch.Generator().manual_seed(7))
        size = parallel_state.get_expert_model_parallel_world_size()
        ids = tokens(2, LENGTH, 5 + (parallel_state.get_data_parallel_rank() if requests == "distinct" else 0))
        full, before = full_forward(model, ids), of_all(weights_of_experts(model))
        home = [layer.mlp.router.weight.detach().clone() for layer in model.decoder.layers]
        plain, stayed = generation(model, ids, {})
        for name in ("blocks", "mixed"):
            moved, context = generation(model, ids, {3: MAPS[size][name]})
            row[f"{name} difference"] = (plain - moved).abs().max().item()
            assert row[f"{name} difference"] <= 1e-5 and torch.equal(plain.argmax(-1), moved.argmax(-1)), row
            assert_conserved(context)
            assert context.stats()["load_per_rank"] == loads(stayed, MAPS[size][name]), "entries are where their experts are"
            own = weights_of_experts(model)
            held = [e for s, (rank,) in enumerate(MAPS[size][name]) for e in (2 * s, 2 * s + 1) if rank == context.core.exchange.rank]
            assert sorted(own) == held and equal(of_all(own), before), "every expert is whole, on the rank of its shard"
            slots = context.core.migration.along[0].expert_of_slot
            for layer, rows in zip(model.decoder.layers, home, strict=True):
                assert torch.equal(layer.mlp.router.weight, rows[list(slots)])
            row[f"{name} full"] = (full_forward(model, ids) - full).abs().max().item()
            assert row[f"{name} full"] <= 1e-5, row
            fresh, other = generation(model, ids, {})  # a context that begins now lies as the experts do
            assert other.core.map.holders == MAPS[size][name] and (fresh - plain).abs().max() <= 1e-5
            assert context.rebalance(MAPS[size]["home"]) and not context.rebalance(MAPS[size]["home"])
            assert equal(weights_of_experts(model), {e: before[e] for e in weights_of_experts(model)})
            assert torch.equal(full_forward(model, ids), full), "back where they were, bit for bit"
            assert context.stats()["rebalance_experts_moved"] > 0
        moved, context = generation(model, ids, {2: MAPS[size]["mixed"]}, bytes_per_step=8192)
        assert (plain - moved).abs().max() <= 1e-5 and context.core.map.holders == MAPS[size]["mixed"]
        assert sorted(weights_of_experts(model)) == held, "experts that move beside the forwards, in one of them"
        assert context.stats()["rebalance_bytes_ahead"] > 0


def loads(stayed: PiKVInferenceContext, holders) -> list[int]:
    by_shard = CacheProbe(stayed.core).loads.sum(0).tolist()
    return [sum(load for load, (at,) in zip(by_shard, holders, strict=True) if at == rank) for rank in range(len(stayed.core.map.of_ranks))]


def check_all_or_nothing(report: Report, layout: str) -> None:
    size = parallel_state.get_expert_model_parallel_world_size()
    ids = tokens(2, LENGTH, 5)
    for fault in ("arrived", "said", "leaving"):
        with report.check(f"{layout} fault in {fault}"):
            model = enable_pikv(tiny_model(tiny_config()), {"storage": {"requests": "auto", "num_shards": 4}, "page_size": 4})
            plain, context = generation(model, ids, {})
            before, state = weights_of_experts(model), [p.detach().clone() for p in model.parameters()]
            kept = getattr(Experts, fault)
            if dist.get_rank() == size - 1:
                setattr(Experts, fault, partialmethod(wrong_sums, kept) if fault == "said" else broken)
            refused(MigrationError, "every shard stays where it was", partial(context.rebalance, MAPS[size]["mixed"]))
            setattr(Experts, fault, kept)
            assert context.core.map.holders == MAPS[size]["home"] and equal(weights_of_experts(model), before)
            assert all(torch.equal(a, b) for a, b in zip(state, model.parameters(), strict=True))
            assert context.rebalance(MAPS[size]["mixed"]), "a later one goes through"
            assert not equal(weights_of_experts(model), before)


def broken(*args):
    raise RuntimeError("out of memory")


def wrong_sums(self, said) -> list[int]:
    return [each + 1 for each in said(self)]


def check_refusals(report: Report, layout: str) -> None:
    def context_of(block: dict | None = None, **changes):
        config = tiny_config(**changes)
        model = enable_pikv(tiny_model(config, local_spec(config)), {"storage": {"requests": "auto", "num_shards": 4, **(block or {})}})
        return PiKVInferenceContext(2, LENGTH, model=model)

    holders = MAPS[parallel_state.get_expert_model_parallel_world_size()]["blocks"]
    cases = {
        "storage.placement = 'position'": ({"placement": "position"}, {}),
        "expert_ids = 'true'": ({"expert_ids": "true"}, {}),
        "moe_router_num_groups": ({}, dict(moe_router_num_groups=2, moe_router_group_topk=1)),
    }
    for words, (block, changes) in cases.items():
        with report.check(f"{layout} refuses {words}"):
            context = context_of(block, **changes)
            refused(UnsupportedError, words, lambda context=context: context.rebalance(holders, experts=True))
            assert context.rebalance(holders), "entries alone"
            assert not hasattr(context.layers[0].moe.experts, "pikv_experts")
    with report.check(f"{layout} entries alone"):
        context = context_of()
        before = weights_of_experts_of(context)
        assert context.rebalance(holders, experts=False) and equal(weights_of_experts_of(context), before)
        assert context.rebalance(holders), "the experts follow later"
        assert not equal(weights_of_experts_of(context), before)
    with report.check(f"{layout} disabled and enabled again"):
        model, ids = tiny_model(tiny_config()), tokens(2, LENGTH, 5)
        block = {"storage": {"requests": "auto", "num_shards": 4}}
        full = full_forward(model, ids)
        enable_pikv(model, block)
        PiKVInferenceContext(2, LENGTH, model=model).rebalance(MAPS[len(set(holders))]["mixed"])
        disable_pikv(model)
        assert not any(hasattr(type(module), "pikv_host_class") for module in model.modules())
        assert (full_forward(model, ids) - full).abs().max() <= 1e-5
        enable_pikv(model, block)
        again, _ = generation(model, ids, {2: holders})
        assert (again - full[:, torch.arange(PROMPT - 1, LENGTH)].transpose(0, 1)).abs().max() <= 1e-5


def weights_of_experts_of(context) -> dict:
    found: dict[int, dict[str, torch.Tensor]] = {}
    for i, layer in enumerate(context.layers):
        for j, expert in enumerate(layer.moe.experts.local_experts):
            found.setdefault(j, {}).update({f"{i}.{name}": x.detach().clone() for name, x in expert.named_parameters()})
    return found


def check_layout(report: Report, layout: str) -> None:
    check_generation(report, layout, "auto", "previous_layer", {})
    check_generation(report, layout, "distinct", "lookahead", BIASES)
    check_all_or_nothing(report, layout)
    check_refusals(report, layout)


if __name__ == "__main__":
    each_layout(check_layout, sys.argv[1:])

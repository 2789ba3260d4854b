"""Decoders whose MLPs are DeepSpeed's own MoE layers, and the penalty on TopKGate and on AutoEP's router. One process, or two ranks."""

import torch
import torch.distributed as dist

import pikv_ds
from pikv_ds.adapters.hf.attach import attach
from pikv_ds.cache.inspect import CacheProbe
from pikv_ds.errors import UnsupportedError
from tests.dist.jobs.ds_compare import MICRO, generate, ready
from tests.dist.jobs.report import Report
from tests.ds_moe_models import NUM_EXPERTS, gates, moe_model, routed_experts
from tests.moe_routers import check_calls, watch
from tests.tiny_models import prompt, tiny_model

report = Report()


def rank_prompt(requests: str) -> torch.Tensor:
    """Prompts of one length: DeepSpeed's all-to-all needs equal counts on all ranks when k is 1."""
    return prompt(17, seed=3 + (dist.get_rank() if requests == "distinct" else 0))


def compare(row: dict, engine, ids: torch.Tensor, k: int) -> None:
    """Tokens equal to the dense model with all experts in this process, which has no cache of ours."""
    out, expected = generate(engine, ids), generate(moe_model(k), ids)
    assert torch.equal(out.sequences, expected.sequences), (out.sequences.tolist(), expected.sequences.tolist())
    row["max_logit_diff"] = max((a - b).abs().max().item() for a, b in zip(out.logits, expected.logits, strict=True))
    assert row["max_logit_diff"] <= 1e-5, row["max_logit_diff"]
    row["tokens"] = out.sequences.tolist()


# First, while torch.distributed is not up: init_inference has to start it.
with report.check("init_inference"):
    model = moe_model(2, ep_size=2, rank=report.rank)
    engine = pikv_ds.init_inference(model, {"dtype": "fp32", "pikv": {}}, max_out_tokens=256)
    assert all(layer.mlp.moe.deepspeed_moe.ep_group is not None for layer in model.model.layers)
    compare({}, engine, rank_prompt("replicated"), 2)
    assert engine.pikv.core.exchange.size == 2

rank = dist.get_rank()
for ep_size in (1, 2):
    for k in (1, 2, 3):
        engine = ready(
            pikv_ds.initialize, model=moe_model(k, ep_size, rank if ep_size > 1 else 0), config={**MICRO, "pikv": {"page_size": 4}}
        )
        for requests in ("replicated", "distinct"):
            with report.check(f"ep {ep_size} top-{k} {requests}") as row:
                compare(row, engine.module, rank_prompt(requests), k)
                core = engine.pikv.core
                assert core.exchange.size == 2 and CacheProbe(core).mode == requests
                row["load"] = CacheProbe(core).loads.tolist()
                row["appended"] = engine.pikv.stats()["entries_appended"]
            engine.pikv.reset()
        engine.pikv.detach()

for k in (1, 2):
    with report.check(f"homes follow the gate top-{k}") as row:
        block = {"page_size": 4, "storage": {"expert_ids": "true", "num_shards": NUM_EXPERTS, "capacity_tokens": 200}}
        engine = ready(pikv_ds.initialize, model=moe_model(k, 2, rank), config={**MICRO, "pikv": block})
        seen: list[list] = [[] for _ in gates(engine.module)]
        for own, gate in zip(seen, gates(engine.module), strict=True):
            gate.register_forward_hook(lambda _m, _a, out, own=own: own.append(out))
        generate(engine.module, rank_prompt("replicated"))
        for layer, outputs in enumerate(seen):
            ids = torch.cat([routed_experts(out) for out in outputs])
            homes = CacheProbe(engine.pikv.core).homes(layer)[0, : len(ids)]
            assert torch.equal(homes, ids), (layer, homes.tolist(), ids.tolist())  # a shard per expert
        engine.pikv.detach()

for name, model, config in (
    ("TopKGate", lambda: moe_model(2, 2, rank), MICRO),
    ("AutoEP", lambda: tiny_model("qwen3_moe"), {**MICRO, "expert_parallel": {"enabled": True, "autoep_size": 2}}),
):
    for applies_to in ("selection", "selection_and_weights"):
        with report.check(f"penalty {name} {applies_to}") as row:
            block = {
                "storage": {"expert_ids": "true", "num_shards": 4},
                "routing": {"host_penalty": {"load": 2.0, "applies_to": applies_to}},
            }
            engine = ready(pikv_ds.initialize, model=model(), config={**config, "pikv": block})
            mlps = [layer.mlp for layer in engine.module.model.layers]
            calls = watch([mlp.moe.deepspeed_moe.gate if name == "TopKGate" else mlp.router for mlp in mlps], engine.pikv)
            row["tokens"] = generate(engine.module, rank_prompt("replicated")).sequences.tolist()
            row["moved"] = check_calls(calls, applies_to, "softmax_norm")
            row["penalty"] = calls[0].seen[-1][2].tolist()
            assert row["moved"] > 0
            engine.pikv.detach()

for name, sampled in (("use_rts", dict(k=1, drop_tokens=True, use_rts=True)), ("top2_2nd", dict(k=2, top2_2nd_expert_sampling=True))):
    with report.check(f"refused: {name}"):
        model = moe_model(**sampled)
        for requests in ("auto", "replicated"):
            try:
                attach(model, {"storage": {"requests": requests}}, dist.group.WORLD)
            except UnsupportedError as error:
                assert name in str(error) and "'distinct'" in str(error), error
            else:
                raise AssertionError(f"{name} was accepted with requests {requests}")
        attach(model, {"storage": {"requests": "distinct"}}, dist.group.WORLD).detach()

with report.check("refused: layers of different ep_size"):
    model = moe_model(2)
    model.model.layers[0].mlp = moe_model(2, 2, rank).model.layers[0].mlp
    try:
        pikv_ds.initialize(model=model, config={**MICRO, "pikv": {}})
    except UnsupportedError as error:
        assert "different ep_size" in str(error), error
    else:
        raise AssertionError("accepted")

dist.barrier()
dist.destroy_process_group()

"""Decoders whose MLPs were replaced by deepspeed.moe.layer.MoE: exact, and homes from TopKGate; one process, then two gloo ranks."""

import pytest
import torch

from pikv_ds.adapters.hf.attach import attach
from pikv_ds.adapters.hf.router_output import count_router_experts, output_of
from pikv_ds.cache.inspect import CacheProbe
from pikv_ds.errors import UnsupportedError
from tests.dist.launcher import run_deepspeed_ranks
from tests.ds_moe_models import NUM_EXPERTS, gates, moe_model, routed_experts
from tests.tiny_models import COMMON, prompt

SOURCES = ("previous_layer", "lookahead", "true")


def generate(model):
    with torch.no_grad():
        return model.generate(prompt(20, 1, 2), max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("source", SOURCES)
def test_text_equals_dense_and_homes_are_what_the_gate_routed(k, source):
    model = moe_model(k)
    dense = generate(model)
    storage = {"expert_ids": source, "num_shards": NUM_EXPERTS, "capacity_tokens": 200}  # a shard per expert, none is ever full
    with attach(model, {"page_size": 4, "storage": storage}) as cache:
        seen: list[list] = [[] for _ in gates(model)]
        for own, gate in zip(seen, gates(model), strict=True):
            gate.register_forward_hook(lambda _m, _a, out, own=own: own.append(out))
        out = generate(model)
        homes = [CacheProbe(cache.core).homes(layer)[:, :25] for layer in range(len(seen))]
    assert torch.equal(out.sequences, dense.sequences)
    assert max((a - b).abs().max() for a, b in zip(out.logits, dense.logits, strict=True)) < 1e-5
    # The expert of the largest weight that the gate routed to, by row and position.
    routed = [torch.cat([routed_experts(out).view(2, -1) for out in outputs], 1) for outputs in seen]
    if source == "true":
        assert all(torch.equal(*pair) for pair in zip(homes, routed, strict=True))
    elif source == "previous_layer":
        assert torch.equal(homes[1], routed[0]) and torch.equal(homes[0], (torch.arange(25) % NUM_EXPERTS).expand(2, -1))
    else:
        assert all((home == chosen).float().mean() > 0.4 for home, chosen in zip(homes, routed, strict=True))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_homes_do_not_depend_on_what_is_dropped_or_drawn(k):
    gate = gates(moe_model(k, drop_tokens=True, eval_capacity_factor=0.5, use_rts=True, top2_2nd_expert_sampling=True))[0]
    roomy = gates(moe_model(k))[0]
    hidden = torch.randn(60, COMMON["hidden_size"], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output, kept = gate(hidden, None, True), roomy(hidden, None, True)
    assert (output[3] < 0).any() if len(output) == 7 else (output[1].sum((1, 2)) == 0).any(), "something is dropped"
    ids = output_of(gate).entry_experts(hidden, output, None)
    assert torch.equal(ids, routed_experts(kept))
    assert torch.equal(ids, gate.wg(hidden).argmax(-1))


def test_a_gate_that_returns_something_else_is_refused():
    gate = gates(moe_model(2))[0]
    with pytest.raises(UnsupportedError, match="TopKGate returned 4 values"):
        output_of(gate).routed(gate(torch.randn(8, COMMON["hidden_size"])))


def test_layers_of_different_sizes_are_refused():
    pair = gates(moe_model(1))
    pair[1].wg = torch.nn.Linear(COMMON["hidden_size"], 8, bias=False)
    assert count_router_experts(pair[:1]) == NUM_EXPERTS and count_router_experts([None]) is None
    with pytest.raises(UnsupportedError, match=r"the MoE layers have \[4, 8\] experts"):
        count_router_experts(pair)


@pytest.fixture(scope="module")
def job():
    return run_deepspeed_ranks("ds_moe.py", timeout_s=280)


@pytest.mark.dist
@pytest.mark.slow
def test_job_ended_well(job):
    assert job.returncode == 0, job.describe()
    job.check("init_inference")


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("requests", ["replicated", "distinct"])
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("ep_size", [1, 2])
def test_two_ranks_give_the_text_of_the_dense_model(job, ep_size, k, requests):
    rows = job.check(f"ep {ep_size} top-{k} {requests}")
    assert (rows[0]["tokens"] == rows[1]["tokens"]) == (requests == "replicated")
    assert rows[0]["load"] == rows[1]["load"] and all(sum(layer) > 0 for layer in rows[0]["load"])
    assert sum(row["appended"] for row in rows) == sum(map(sum, rows[0]["load"]))


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 2])
def test_homes_on_two_ranks(job, k):
    job.check(f"homes follow the gate top-{k}")


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("applies_to", ["selection", "selection_and_weights"])
@pytest.mark.parametrize("router", ["TopKGate", "AutoEP"])
def test_penalised_ranks_agree(job, router, applies_to):
    rows = job.check(f"penalty {router} {applies_to}")
    assert rows[0]["tokens"] == rows[1]["tokens"] and rows[0]["penalty"] == rows[1]["penalty"] and any(rows[0]["penalty"])


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("name", ["use_rts", "top2_2nd", "layers of different ep_size"])
def test_refusals(job, name):
    job.check(f"refused: {name}")

"""A penalty on the model's own routers: off is off, on is what the host's code does with lowered logits, refused where it can't be."""

import pytest
import torch
from torch import nn

from pikv_ds.adapters.hf.attach import attach
from pikv_ds.adapters.hf.router_output import find_router
from pikv_ds.cache.inspect import CacheProbe
from pikv_ds.errors import ConfigError, UnsupportedError
from tests.ds_moe_models import gates, moe_model
from tests.moe_routers import check_calls, watch
from tests.tiny_models import prompt, tiny_model

STORAGE = {"num_shards": 8, "expert_ids": "true", "capacity_tokens": 1000}  # a shard per expert, none is ever full
# family -> how its router weighs a chosen set, and its scale
RULES = {
    "qwen3_moe": ("softmax_norm", 1.0),
    "mixtral": ("softmax_norm", 1.0),
    "gpt_oss": ("softmax_norm", 1.0),
    "qwen2_moe": ("softmax", 1.0),
    "olmoe": ("softmax", 1.0),
    "deepseek_v2": ("softmax", 1.0),
    "deepseek_v3": ("sigmoid_norm", 2.5),
}
MODES = ("selection", "selection_and_weights")


def routers_of(model) -> list[nn.Module | None]:
    return [find_router(layer) for layer in model.model.layers]


def block(storage: dict = STORAGE, **penalty) -> dict:
    return {"page_size": 4, "storage": storage, "routing": {"host_penalty": penalty} if penalty else {}}


def generate(model, length: int = 24, new: int = 6) -> torch.Tensor:
    options = dict(do_sample=False, max_new_tokens=new, min_new_tokens=new, return_dict_in_generate=True, output_logits=True)
    with torch.no_grad():
        return torch.stack(model.generate(prompt(length, seed=5), **options).logits)


def hooks_of(model) -> list[int]:
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._forward_hooks_always_called) for m in model.modules()]


@pytest.mark.parametrize("applies_to", MODES)
@pytest.mark.parametrize("family", RULES)
def test_chooses_and_weighs_as_the_hosts_router_on_lowered_logits(family, applies_to):
    model = tiny_model(family)
    with attach(model, block(load=1.0, applies_to=applies_to)) as cache:
        calls = watch(routers_of(model), cache)
        generate(model)
        assert check_calls(calls, applies_to, *RULES[family]) > 0, "the penalty moved no token"


@pytest.mark.parametrize("applies_to", MODES)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_top_k_gate_chooses_and_weighs_as_on_lowered_logits(k, applies_to):
    model = moe_model(k)
    with attach(model, block({**STORAGE, "num_shards": 4}, load=2.0, applies_to=applies_to)) as cache:
        calls = watch(gates(model), cache)
        generate(model)
        assert check_calls(calls, applies_to, "softmax" if k == 1 else "softmax_norm") > 0


@pytest.mark.parametrize("k", [1, 2, 3])
def test_top_k_gate_that_drops_weighs_what_it_keeps(k):
    model = moe_model(k, drop_tokens=True, eval_capacity_factor=0.6)
    with attach(model, block({**STORAGE, "num_shards": 4}, load=1.0)) as cache:
        calls = watch(gates(model), cache)
        generate(model, new=1)
    for router in calls:
        ((_, output, _),) = router.seen
        ids, weights = output[3], output[5]
        assert (ids < 0).any() and (weights[ids < 0] == 0).all()
        kept = (ids >= 0).any(0)
        if k > 1:
            assert torch.allclose(weights.sum(0)[kept], torch.ones(int(kept.sum())), atol=1e-6)


@pytest.mark.parametrize("applies_to", MODES)
def test_load_penalty_evens_out_the_shards(applies_to):
    model, loads = tiny_model("qwen3_moe"), []
    for penalty in ({}, {"load": 4.0, "applies_to": applies_to}):
        with attach(model, block(**penalty)) as cache:
            generate(model, length=100)
            loads.append(CacheProbe(cache.core).loads.float())
    assert torch.equal(loads[0].sum(1), loads[1].sum(1)), "entries were lost"
    assert (loads[1].std(1) < loads[0].std(1)).all(), loads


def test_the_penalised_router_is_the_one_that_names_the_entries():
    """With previous_layer, router l names the entries of layer l + 1 and looks at that layer's load; the last router is left alone."""
    model, loads = tiny_model("qwen3_moe", num_hidden_layers=3), []
    for penalty in ({}, {"load": 4.0}):
        with attach(model, block({**STORAGE, "expert_ids": "previous_layer"}, **penalty)) as cache:
            generate(model, length=100)
            loads.append(CacheProbe(cache.core).loads.float())
            if penalty:
                assert not cache.penalty.of(2, cache.core).any() and cache.penalty.of(1, cache.core).any()
    assert (loads[1][1:].std(1) < loads[0][1:].std(1)).all(), loads
    assert torch.equal(loads[1][0], loads[0][0]), "layer 0 has no earlier router: its entries are hashed by position"


@pytest.mark.parametrize("source", ["true", "lookahead", "previous_layer"])
def test_miss_penalty_keeps_tokens_and_entries_from_an_expert(source):
    model = tiny_model("qwen3_moe")
    with attach(model, block({**STORAGE, "expert_ids": source}, miss=100.0)) as cache:
        for layer in range(2):
            cache.add_misses(layer, torch.nn.functional.one_hot(torch.tensor(5), 8) * 7)
        calls = watch(routers_of(model), cache)
        generate(model)
        chosen = [output[2] for router in calls[: 1 if source == "previous_layer" else 2] for _, output, _ in router.seen]
        assert not any((ids == 5).any() for ids in chosen)
        assert (CacheProbe(cache.core).loads[1, 5] == 0).all(), "the homes follow the penalised choice"


def test_misses_of_the_cache_aware_router_feed_the_penalty():
    model = tiny_model("qwen3_moe")
    config = block({"num_shards": 4, "expert_ids": "true", "capacity_tokens": 1000}, miss=1.0)
    config["routing"] |= {"method": "cache_aware", "top_k": 2, "sink_tokens": 0, "recent_tokens": 0}
    with attach(model, config) as cache:
        generate(model, length=60)
        missed = CacheProbe(cache.core).router.misses.columns[1].value[0]  # of the one row
        assert missed.max() > missed.min()
        assert torch.allclose(cache.penalty.of(1, cache.core), torch.log1p(missed[torch.arange(8) // 2]))


@pytest.mark.parametrize("family", ["qwen3_moe", "legacy"])
def test_off_installs_nothing_and_detach_takes_everything_off(family):
    build = (lambda: moe_model(2)) if family == "legacy" else (lambda: tiny_model(family))
    model, plain = build(), build()
    before, dense = hooks_of(model), generate(model)
    with attach(model, block()) as cache, attach(plain, {"page_size": 4, "storage": STORAGE}):
        assert cache.penalty is None and hooks_of(model) == hooks_of(plain)
        unpenalised = generate(model)
        assert torch.equal(unpenalised, generate(plain))
    with attach(model, block(load=2.0)):
        assert hooks_of(model) != before
        assert not torch.equal(generate(model), unpenalised)
        ids = prompt(9, seed=2)
        with torch.no_grad():  # a forward that does not run through the cache is the host's own
            assert torch.equal(model(ids, use_cache=False).logits, build()(ids, use_cache=False).logits)
    assert hooks_of(model) == before and torch.equal(generate(model), dense)


def test_a_router_that_raises_leaves_no_penalty_behind():
    model = tiny_model("qwen3_moe")
    router, fail = routers_of(model)[0], True

    def breaks(*_):
        if fail:
            raise RuntimeError("router failed")

    with attach(model, block(load=2.0)) as cache:
        handle = router.register_forward_pre_hook(breaks)
        with pytest.raises(RuntimeError, match="router failed"):
            generate(model)
        handle.remove()
        assert torch.equal(nn.functional.linear(torch.ones(1, 2), torch.ones(8, 2)), torch.full((1, 8), 2.0)), "the mode is still on"
        cache.reset()
        generate(model)


class OddTopKRouter(nn.Module):
    """Routes like none of the hosts: the weights of its choice are ranks, not scores."""

    def __init__(self, weight: nn.Parameter, linears: int = 1) -> None:
        super().__init__()
        self.weight, self.linears = weight, linears

    def forward(self, hidden):
        for _ in range(self.linears):
            logits = nn.functional.linear(hidden, self.weight)
        ids = logits.topk(2, -1).indices
        return logits, torch.tensor([0.75, 0.25]).expand(len(ids), 2), ids


def odd_model(linears: int):
    model = tiny_model("qwen3_moe")
    for layer in model.model.layers:
        layer.mlp.gate = OddTopKRouter(layer.mlp.gate.weight, linears)
    return model


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        (lambda: tiny_model("qwen3_dense"), ConfigError, "Qwen3ForCausalLM has no expert router"),
        (lambda: odd_model(1), UnsupportedError, "OddTopKRouter: its weights are neither softmax nor sigmoid"),
        (lambda: odd_model(2), UnsupportedError, "OddTopKRouter: its logits .* are not the result of one F.linear"),
    ],
)
def test_refused(model, error, words):
    model = model()
    before = hooks_of(model)
    with pytest.raises(error, match=words):
        attach(model, {"routing": {"host_penalty": {"load": 1.0}}})
    assert hooks_of(model) == before
    attach(model).detach()


def test_misses_without_a_penalty_are_refused():
    with attach(tiny_model("qwen3_moe")) as cache, pytest.raises(ConfigError, match="add_misses without"):
        cache.add_misses(0, torch.zeros(8))

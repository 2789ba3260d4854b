"""Checks of PiKVTopKRouter: a penalty from the state of the cache moves tokens, and nothing else."""

import torch

from pikv_ds.cache.inspect import CacheProbe
from pikv_ds.errors import ConfigError, UnsupportedError
from pikv_ds.megatron_patch import PiKVInferenceContext, RouterPenalty, disable_pikv, enable_pikv, pikv_layer_spec
from pikv_ds.megatron_patch.layer_spec import moe_submodules
from pikv_ds.megatron_patch.penalty import model_weights
from tests.dist.jobs.report import Report
from tests.megatron import documented
from tests.megatron.models import local_spec, tiny_config, tiny_model
from tests.megatron.runs import decode, full_forward, refused

ROUTINGS = {
    "softmax": {},
    "softmax before the choice": dict(moe_router_pre_softmax=True),
    "scaled": dict(moe_router_topk_scaling_factor=2.5),
    "sigmoid": dict(moe_router_score_function="sigmoid"),
}
CONFIG = {"page_size": 4, "storage": {"expert_ids": "true", "num_shards": 8, "capacity_tokens": 1000}}  # a shard per expert


def watch(model) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """(probs, routing_map) of every router call, per layer."""
    calls: list[list] = [[] for _ in model.decoder.layers]
    for layer, own in zip(model.decoder.layers, calls, strict=True):
        layer.mlp.router.register_forward_hook(lambda _m, _a, out, own=own: own.append(out))
    return calls


def run(model, ids: torch.Tensor, penalty: RouterPenalty | None, misses: dict[int, float] | None = None):
    enable_pikv(model, CONFIG, router_penalty=penalty)
    context = PiKVInferenceContext(len(ids), ids.shape[1], model=model)
    for expert, count in (misses or {}).items():
        for layer in range(len(model.decoder.layers)):
            context.add_misses(layer, torch.nn.functional.one_hot(torch.tensor(expert), 8) * count)
    logits = decode(model, context, ids, [9])
    disable_pikv(model)
    return logits, context


def check_penalty(report: Report, ids: torch.Tensor) -> None:
    model = tiny_model(tiny_config())
    without, context = run(model, ids, None)
    uneven = CacheProbe(context.core).loads.float()
    with report.check("penalty of strength 0 changes nothing"):
        assert torch.equal(run(model, ids, RouterPenalty(applies_to="selection_and_weights"))[0], without)
        assert (run(model, ids, RouterPenalty())[0] - without).abs().max() <= 1e-5
    with report.check("load penalty evens out the shards"):
        for applies_to in ("selection", "selection_and_weights"):
            _, context = run(model, ids, RouterPenalty(load=2.0, applies_to=applies_to))
            even = CacheProbe(context.core).loads.float()
            assert torch.equal(even.sum(1), uneven.sum(1)), "entries were lost"
            assert (even.std(1) < uneven.std(1)).all(), (even.std(1), uneven.std(1))
    with report.check("miss penalty keeps tokens from an expert"):
        calls = watch(model)
        run(model, ids, RouterPenalty(miss=100.0), misses={5: 7})
        assert not any(routing_map[:, 5].any() for layer in calls for _, routing_map in layer)
        assert all(torch.allclose(probs.sum(-1), torch.ones(len(probs))) for layer in calls for probs, _ in layer)
    for name, changes in ROUTINGS.items():
        with report.check(f"weights of a chosen set are the model's own, {name}"):
            model = tiny_model(tiny_config(**changes))
            router = model.decoder.layers[1].mlp.router
            logits = torch.randn(40, 1, 8, generator=torch.Generator().manual_seed(2))
            probs, routing_map = router.routing(logits)
            assert torch.allclose(model_weights(logits.view(40, 8), routing_map, model.config), probs, atol=1e-6)
    with report.check("the documented penalty"):
        model = tiny_model(tiny_config())
        documented.run("RouterPenalty(load", model=model)
        assert type(model.decoder.layers[0].mlp.router).__name__ == "PiKVTopKRouter"
        assert model.decoder.layers[0].mlp.router.pikv_penalty == RouterPenalty(load=0.5, miss=0.1, applies_to="selection")
    with report.check("the penalty of the block"):
        model, given = tiny_model(tiny_config()), RouterPenalty(load=2.0, applies_to="selection_and_weights")
        asked = {**CONFIG, "routing": {"host_penalty": {"load": 2.0, "applies_to": "selection_and_weights"}}}
        expected = run(model, ids, given)[0]
        enable_pikv(model, asked)
        assert all(layer.mlp.router.pikv_penalty == given for layer in model.decoder.layers)
        assert torch.equal(decode(model, PiKVInferenceContext(len(ids), ids.shape[1], model=model), ids, [9]), expected)
        disable_pikv(model)
        built = pikv_layer_spec(local_spec(tiny_config()), asked)
        assert moe_submodules(built.submodules.mlp).router.keywords["pikv_penalty"] == given
        enable_pikv(model, CONFIG)
        assert all(layer.mlp.router.pikv_penalty is None for layer in model.decoder.layers)
        other = lambda: PiKVInferenceContext(len(ids), ids.shape[1], model=model, config=asked)  # noqa: E731
        refused(ConfigError, "the model's routers were enabled with None", other)
        disable_pikv(model)
        refused(ConfigError, "two different penalties", lambda: enable_pikv(model, asked, router_penalty=RouterPenalty(load=1.0)))
    with report.check("dense models refused"):
        flat = tiny_model(tiny_config(num_moe_experts=None, moe_ffn_hidden_size=None, expert_model_parallel_size=1))
        refused(ConfigError, "on a dense model", lambda: enable_pikv(flat, asked))
        enable_pikv(flat, {"routing": {"method": "experts"}})
        refused(ConfigError, "is a dense model without experts", lambda: PiKVInferenceContext(len(ids), ids.shape[1], model=flat))
        disable_pikv(flat)
    with report.check("penalty without a context, in a specification, refused"):
        config = tiny_config()
        built = tiny_model(config, pikv_layer_spec(local_spec(config), CONFIG, router_penalty=RouterPenalty(load=2.0)))
        plain = tiny_model(config)
        assert list(built.state_dict()) == list(plain.state_dict())
        assert torch.equal(full_forward(built, ids), full_forward(plain, ids))
        dropping = tiny_model(tiny_config(moe_expert_capacity_factor=1.0))
        for kind, match, call in (
            (UnsupportedError, "moe_expert_capacity_factor", lambda: enable_pikv(dropping, router_penalty=RouterPenalty(load=1.0))),
            (ConfigError, "load=-1", lambda: RouterPenalty(load=-1)),
            (ConfigError, "applies_to='weights'", lambda: RouterPenalty(applies_to="weights")),
        ):
            refused(kind, match, call)

"""Layers that are compiled with fullgraph=True: the cache is an op of their graph, not a break in it."""

import pytest
import torch

import pikv_ds
from pikv_ds.adapters.hf import traced
from pikv_ds.errors import UnsupportedError
from tests.long_form import LONG, short_or_long
from tests.tiny_models import prompt, tiny_model

CASES = {  # family, block, backend
    "qwen3_moe, experts of the layer before": ("qwen3_moe", {"page_size": 4, "storage": {"num_shards": 4}}, "eager"),
    "qwen3_moe, without mutation": ("qwen3_moe", {"page_size": 4, "storage": {"num_shards": 4}}, "aot_eager"),
    "mixtral, a window": ("mixtral", {"page_size": 4}, "aot_eager"),
    "deepseek_v3, a latent": ("deepseek_v3", {"page_size": 4}, "aot_eager"),
    "gpt_oss, sinks": ("gpt_oss", {"page_size": 4}, "eager"),
    "gemma2, bounded scores": ("gemma2", {"page_size": 4}, "eager"),
    "olmoe, true experts": ("olmoe", {"page_size": 4, "storage": {"num_shards": 4, "expert_ids": "true"}}, "eager"),
    "qwen3_moe, looking ahead": ("qwen3_moe", {"page_size": 4, "storage": {"num_shards": 4, "expert_ids": "lookahead"}}, "eager"),
    "qwen3_moe, inductor": ("qwen3_moe", {"page_size": 4, "storage": {"num_shards": 4}}, "inductor"),
}
SHORT = ["qwen3_moe, experts of the layer before"]


def counted() -> dict:
    """What dynamo counts, which is imported when it is asked for."""
    from torch._dynamo.utils import counters

    return counters


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()
    counted().clear()
    yield
    torch._dynamo.reset()


def logits(model, block: dict, ids: torch.Tensor) -> tuple[list[torch.Tensor], dict]:
    with torch.no_grad(), pikv_ds.attach(model, block) as cache:
        found = [model(ids[:, :9], past_key_values=cache).logits, model(ids[:, 9:14], past_key_values=cache).logits]
        found += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(14, 19)]
        return found, cache.stats()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", short_or_long(SHORT, list(CASES)))
def test_compiled_layers_have_one_graph(name):
    family, block, backend = CASES[name]
    model, ids = tiny_model(family), prompt(21, seed=2)
    if family != "gemma2":
        model.set_experts_implementation("batched_mm")
    expected, stored = logits(model, block, ids)
    some = not LONG or backend == "inductor"  # the other layer hears what the first one's router has chosen
    compiled = model.model.layers[:1] if some else model.model.layers
    for layer in compiled:
        layer.compile(backend=backend, fullgraph=True, dynamic=True)
    found, stored_too = logits(model, block, ids)
    seen = counted()
    assert seen["stats"]["unique_graphs"] >= 2 * len(compiled) and not seen["graph_break"], seen
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=2e-5)
    alike = ("entries_live", "entries_appended", "entries_per_expert")
    assert {name: stored.get(name) for name in alike} == {name: stored_too.get(name) for name in alike}


@pytest.mark.skipif(not LONG, reason="the long form: the model is traced a second time")
def test_where_a_graph_is_recorded_it_is_a_break():
    model, ids = tiny_model("qwen3_moe"), prompt(12, seed=2)
    with pikv_ds.attach(model, {"page_size": 4}) as cache:
        model(ids, past_key_values=cache).logits.sum().backward()
        expected = model.model.embed_tokens.weight.grad.clone()
    model.zero_grad()
    for layer in model.model.layers:
        layer.compile(backend="eager", dynamic=True)
    with pikv_ds.attach(model, {"page_size": 4}) as cache:
        model(ids, past_key_values=cache).logits.sum().backward()
    torch.testing.assert_close(model.model.embed_tokens.weight.grad, expected, rtol=1e-4, atol=1e-4)


def test_the_ops_are_what_compilers_expect():
    clock = torch.zeros((), dtype=torch.int64)
    schema = torch.ops.pikv_host.attention.default._schema
    assert [x.name for x in schema.arguments if x.alias_info is not None] == ["clock"]
    q, k = torch.randn(1, 4, 3, 8, device="meta"), torch.randn(1, 2, 3, 8, device="meta")
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        found = torch.ops.pikv_host.attention(q, k, k, None, None, clock, 0, 0.1, 0.0, None, None, "")
    assert found.shape == (1, 3, 4, 8) and found.dtype == q.dtype
    with pytest.raises(UnsupportedError, match="outside of a forward"):
        traced.bring(torch.zeros(1), torch.zeros(1), 0)

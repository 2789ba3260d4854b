"""Attach on one rank: a good guest before, during and after."""

import copy

import pytest
import torch
from transformers import AttentionInterface, DynamicCache

import pikv_ds
from tests.dist.jobs.exact import assert_same, generate
from tests.host_guard import DenseUsed, host_is_forbidden
from tests.tiny_models import FAMILIES, prompt, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_dense_behind_the_scenes(family):
    model = tiny_model(family)
    ids = prompt(9, seed=2)
    with host_is_forbidden(model), pytest.raises(DenseUsed):
        model.generate(ids, max_new_tokens=2)
    with pikv_ds.attach(model, {}), host_is_forbidden(model):
        model.generate(ids, max_new_tokens=2)


def test_detach_restores_the_model():
    model = tiny_model("qwen3_moe")
    ids = prompt(9, seed=2)
    before = generate(model, ids, new_tokens=6)
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    own = set(model.__dict__)
    with pikv_ds.attach(model, {}):
        generate(model, ids, new_tokens=6)
    assert {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()} == hooks
    assert set(model.__dict__) == own
    assert model.config._attn_implementation == "eager"
    after = generate(model, ids, new_tokens=6)
    assert torch.equal(before.logits, after.logits)
    assert isinstance(model(ids).past_key_values, DynamicCache)


def test_train_mode_is_left_to_the_host():
    model = tiny_model("qwen3_moe")
    ids = prompt(9, seed=2)
    twin = copy.deepcopy(model)
    with pikv_ds.attach(model, {}) as cache:
        model.train(), twin.train()
        mine, theirs = model(ids, labels=ids), twin(ids, labels=ids)
        assert isinstance(mine.past_key_values, DynamicCache)
        assert torch.equal(mine.loss, theirs.loss)
        mine.loss.backward(), theirs.loss.backward()
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad), name
        assert cache.steps == 0


def test_forward_without_cache_is_left_to_the_host():
    model = tiny_model("qwen3_moe")
    ids = prompt(9, seed=2)
    expected = model(ids, use_cache=False).logits
    with pikv_ds.attach(model, {}) as cache:
        assert torch.equal(model(ids, use_cache=False).logits, expected)
        assert cache.steps == 0


def test_own_loop_over_the_returned_cache():
    model = tiny_model("mixtral")
    ids = prompt(20, seed=2)
    reference = generate(model, ids, new_tokens=12)
    with torch.no_grad(), pikv_ds.attach(model, {"page_size": 4}) as cache:
        out, token, logits = model(ids), None, []
        assert out.past_key_values.core is cache.core
        for _ in range(12):
            logits.append(out.logits[:, -1])
            token = logits[-1].argmax(-1, keepdim=True)
            out = model(token, past_key_values=out.past_key_values)
    assert (torch.stack(logits) - reference.logits).abs().max() < 1e-5


def test_right_padding_is_not_stored_either():
    model = tiny_model("qwen3_moe")
    ids = prompt(8, seed=2, batch=2)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    with torch.no_grad():
        alone = model(ids[1:, :5]).logits[0, -1]
        with pikv_ds.attach(model, {}) as cache:
            assert (model(ids, attention_mask=mask).logits[1, 4] - alone).abs().max() < 1e-5
            assert cache.stats()["entries_live"] == 2 * (8 + 5)


def test_shared_attention_registry_survives_two_models():
    first, second = tiny_model("qwen3_moe"), tiny_model("mixtral")
    ids = prompt(12, seed=2)
    references = [generate(m, ids, new_tokens=5) for m in (first, second)]
    with pikv_ds.attach(first, {}), pikv_ds.attach(second, {"page_size": 3}):
        assert_same(generate(first, ids, new_tokens=5), references[0], 1e-5)
        assert_same(generate(second, ids, new_tokens=5), references[1], 1e-5)
    assert "pikv" in AttentionInterface._global_mapping


def test_stats_are_plain_numbers():
    model = tiny_model("qwen3_moe")
    with pikv_ds.attach(model, {}) as cache:
        generate(model, prompt(9, seed=2), new_tokens=3)
        stats = cache.stats()
    wanted = {
        "kv_bytes_allocated",
        "kv_bytes_live",
        "kv_bytes_dense",
        "entries_live",
        "entries_appended",
        "entries_expired",
        "entries_evicted",
        "entries_cropped",
        "exchange_bytes_sent",
        "exchange_collectives",
        "load_per_rank",
        "load_per_expert",
        "spilled",
        "attention_impl",
    }
    assert wanted <= set(stats)
    assert stats.pop("entries_read") is None and stats.pop("entries_visible") is None  # counted by a router that leaves pages out
    assert stats.pop("probe_s") == 0.0, "a model as transformers has it needs no probe"
    for name, value in stats.items():
        assert isinstance(value, int | str) or (isinstance(value, list) and all(isinstance(v, int) for v in value)), name
    assert stats["kv_bytes_dense"] == 2 * 11 * 2 * 2 * 16 * 4  # layers x tokens x (k, v) x heads x head_dim x bytes
    assert sum(stats["load_per_expert"]) == stats["entries_appended"] == 2 * 11

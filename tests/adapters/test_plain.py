"""Decode steps of a model go the plain way, unless something about them is unusual: then they go the other, with the same answer."""

import pytest
import torch

import pikv_ds
from pikv_ds.adapters.hf import attention
from pikv_ds.errors import UnsupportedError
from tests.tiny_models import prompt, tiny_model
from tests.torch_defaults import double_by_default


@pytest.fixture
def ordinary(monkeypatch):
    """Layers that went the ordinary way."""
    seen, plain = [], attention._attention
    monkeypatch.setattr(attention, "_attention", lambda *args: (seen.append(args[0].layer_idx), plain(*args))[1])
    return seen


def steps(model, cache, ids, **given):
    return model(ids, past_key_values=cache, **given).logits


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_decode_step_is_plain(family, ordinary):
    model = tiny_model(family)
    ids, layers = prompt(24, seed=1), model.config.num_hidden_layers
    with torch.no_grad(), pikv_ds.attach(model) as cache:
        steps(model, cache, ids[:, :12])
        assert len(ordinary) == layers
        ordinary.clear()
        for at in range(12, 24):
            last = steps(model, cache, ids[:, at : at + 1])
        # The sinks of gpt-oss are no part of it.
        assert ordinary == ([] if family != "gpt_oss" else list(range(layers)) * 12)
        whole = steps(model, cache.new_cache(), ids)[:, -1:]
    torch.testing.assert_close(last, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("unusual", ["a graph", "autocast", "a default device", "half of the layers", "several tokens", "a mask"])
def test_what_is_unusual_goes_the_other_way(unusual, ordinary):
    model = tiny_model("qwen3_moe")
    ids = prompt(24, seed=1)
    outputs = []
    for mode in (None, unusual):
        with torch.no_grad(), pikv_ds.attach(model) as cache:
            steps(model, cache, ids[:, :12])
            steps(model, cache, ids[:, 12:13])
            ordinary.clear()
            outputs.append(_step(mode, model, cache, ids))
            asked = len(ordinary)
            assert (asked > 0) == (mode is not None)
            ordinary.clear()
            outputs.append(steps(model, cache, ids[:, 23:24]))
            assert not ordinary, "and the next one is plain again"
    if unusual not in ("several tokens", "autocast"):
        torch.testing.assert_close(outputs[0], outputs[2].to(outputs[0].dtype), rtol=0, atol=1e-6)


def _step(mode, model, cache, ids):
    given = ids[:, 13:14]
    if mode == "a graph":
        with torch.enable_grad():
            return steps(model, cache, given).detach()
    if mode == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            return steps(model, cache, given)
    if mode == "a default device":
        with torch.device("cpu"):
            return steps(model, cache, given)
    if mode == "several tokens":
        return steps(model, cache, ids[:, 13:15])
    if mode == "a mask":
        lowest = torch.finfo(torch.float32).min
        mask = torch.full((1, 1, 1, 14), 0.0).masked_fill(torch.zeros(1, 1, 1, 14, dtype=torch.bool), lowest)
        return steps(model, cache, given, attention_mask=mask)
    if mode == "half of the layers":
        handle = model.model.layers[1].self_attn.register_forward_pre_hook(_with_graph)
        after = model.model.layers[1].self_attn.register_forward_hook(lambda *args: torch.set_grad_enabled(False) and None)
        try:
            return steps(model, cache, given).detach()
        finally:
            handle.remove()
            after.remove()
    return steps(model, cache, given)


def _with_graph(*args) -> None:
    torch.set_grad_enabled(True)


def test_doubles_by_default_change_nothing(ordinary):
    model = tiny_model("qwen3_moe")
    ids = prompt(14, seed=1)
    with torch.no_grad(), pikv_ds.attach(model) as cache, double_by_default():
        steps(model, cache, ids[:, :12])
        ordinary.clear()
        assert steps(model, cache, ids[:, 12:13]).dtype == torch.float32 and not ordinary


@pytest.mark.parametrize(
    "given, words",
    [
        ({"dropout": 0.1}, "dropout"),
        ({"sliding_window": 3}, "sliding_window 3"),
        ({"softcap": 5.0}, "softcap 5.0"),
        ({"cu_seq_lens_q": torch.zeros(2)}, "'cu_seq_lens_q' is set"),
    ],
)
def test_what_cannot_be_honoured_is_refused_in_a_decode_step_too(given, words, monkeypatch):
    model = tiny_model("qwen3_moe")
    ids = prompt(14, seed=1)
    from transformers import AttentionInterface

    with torch.no_grad(), pikv_ds.attach(model) as cache:
        steps(model, cache, ids[:, :12])
        steps(model, cache, ids[:, 12:13])
        plain = attention.pikv_attention
        monkeypatch.setitem(AttentionInterface._global_mapping, "pikv", lambda *args, **named: plain(*args, **named | given))
        with pytest.raises(UnsupportedError, match=words):
            steps(model, cache, ids[:, 13:14])


def test_keys_that_the_model_changes_after_the_cache_are_refused(monkeypatch):
    model = tiny_model("qwen3_moe")
    ids = prompt(14, seed=1)
    from transformers import AttentionInterface

    with torch.no_grad(), pikv_ds.attach(model) as cache:
        steps(model, cache, ids[:, :12])
        plain = attention.pikv_attention
        changed = lambda module, q, k, v, mask, **named: plain(module, q, k * 2, v, mask, **named)  # noqa: E731
        monkeypatch.setitem(AttentionInterface._global_mapping, "pikv", changed)
        with pytest.raises(UnsupportedError, match="changes keys or values between the cache and attention"):
            steps(model, cache, ids[:, 12:13])

"""Decode steps of a model that are recorded and played give the model's own logits, whatever happens between them."""

import gc

import pytest
import torch

import pikv_ds
from pikv_ds.adapters.hf.decode_graph import DecodeGraph
from pikv_ds.errors import UnsupportedError
from tests.device.far import Far, FarTensor, to_far
from tests.device.tape import Tape, held
from tests.long_form import short_or_long
from tests.tiny_models import prompt, tiny_model

CASES = {
    "qwen3_moe": {},
    "mixtral": {},  # a window
    "gpt_oss": {"storage": {"num_shards": 2}},  # windows and sinks
    "deepseek_v3": {},  # a latent
    "gemma2": {},  # scores that are bounded
    "olmoe": {"storage": {"num_shards": 4, "expert_ids": "true"}},
}
DENSE = ("gemma2",)


def _model(family: str):
    model = tiny_model(family)
    if family not in DENSE:
        model.set_experts_implementation("batched_mm")
    return model


@pytest.mark.parametrize("family", short_or_long(["mixtral", "gpt_oss"], list(CASES)))
@torch.no_grad()
def test_a_played_step_is_a_step(family):
    model, ids = _model(family), torch.cat([prompt(21, seed=row) for row in range(2)])
    with pikv_ds.attach(model, {"page_size": 4, **CASES[family]}) as attached:
        played, plain = attached.new_cache(), attached.new_cache()
        for cache in (played, plain):
            model(ids, past_key_values=cache)
        graph = DecodeGraph(model, played, tokens=64, recorder=Tape())
        for step in range(16):
            token = ids[:, step : step + 1]
            expected = model(token, past_key_values=plain).logits
            found = graph(token) if step != 9 else model(token, past_key_values=played).logits  # one that is not played
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        assert played.lens == plain.lens and played.columns == plain.columns and not graph.stale
        played.batch_repeat_interleave(2)
        with pytest.raises(UnsupportedError, match="rows"):
            graph(ids[:, :1])


@torch.no_grad()
def test_padded_rows():
    model, ids = _model("qwen3_moe"), torch.cat([prompt(21, seed=row) for row in range(2)])
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with pikv_ds.attach(model, {"page_size": 4}) as attached:
        played, plain = attached.new_cache(), attached.new_cache()
        at = (mask.cumsum(1) - 1).clamp_min(0)
        for cache in (played, plain):
            model(ids, attention_mask=mask, position_ids=at, past_key_values=cache)
        graph = DecodeGraph(model, played, tokens=64, recorder=Tape())
        for step in range(6):
            mask, token = torch.nn.functional.pad(mask, (0, 1), value=1), ids[:, step : step + 1]
            own = mask.sum(1, keepdim=True) - 1
            expected = model(token, attention_mask=mask, position_ids=own, past_key_values=plain).logits
            torch.testing.assert_close(graph(token, mask), expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_on_a_device_nobody_waits(monkeypatch):
    with Far().entered(monkeypatch) as far:
        model, ids = to_far(_model("qwen3_moe")), torch.cat([prompt(21, seed=row) for row in range(2)])
        with pikv_ds.attach(model, {"page_size": 4, "storage": {"num_shards": 2}}) as attached:
            cache = attached.new_cache()
            model(FarTensor(ids), past_key_values=cache)
            graph, logits = DecodeGraph(model, cache, tokens=64, recorder=Tape()), []
            for step in range(8):
                if step == 3:
                    far.clear()
                logits.append(held(graph(FarTensor(ids[:, step : step + 1]))).clone())
                far.next_step()
            del cache, graph
            gc.collect()  # what they hold is given back while there is a device
        assert far.total() == 0 and not far.waits, (far.stops, far.waits)
    here = _model("qwen3_moe")
    with pikv_ds.attach(here, {"page_size": 4, "storage": {"num_shards": 2}}) as attached:
        cache = attached.new_cache()
        here(ids, past_key_values=cache)
        for step, found in enumerate(logits):
            torch.testing.assert_close(found, here(ids[:, step : step + 1], past_key_values=cache).logits, rtol=0, atol=1e-5)


def test_what_has_no_graph():
    model = tiny_model("qwen3_next")
    with torch.no_grad(), pikv_ds.attach(model, {"page_size": 4}) as cache:
        model(prompt(9, seed=2), past_key_values=cache)
        with pytest.raises(UnsupportedError, match="recurrent"):
            DecodeGraph(model, cache, tokens=64)
    with pytest.raises(UnsupportedError, match="attach"):
        DecodeGraph(model, cache, tokens=64)

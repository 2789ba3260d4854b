"""After reset() a transformers cache holds no tensor that a new one does not, whatever ran before."""

import pytest
import torch

import pikv_ds
from pikv_ds.cache.inspect import CacheProbe
from pikv_ds.errors import UnsupportedError
from tests.held import held_bytes
from tests.tiny_models import prompt, tiny_model


def held(model, cache) -> int:
    return held_bytes(cache, without=[*model.parameters(), *model.buffers(), *CacheProbe(cache.core).weights])


def breaks(*_) -> None:
    raise ArithmeticError


@torch.no_grad()
@pytest.mark.parametrize("source", ["previous_layer", "lookahead", "true"])
def test_nothing_stays(source):
    model = tiny_model("qwen3_moe")
    with pikv_ds.attach(model, {"page_size": 4, "storage": {"expert_ids": source}}) as cache:
        new = held(model, cache)
        ids = prompt(20, seed=1, batch=2)
        mask = torch.ones_like(ids)
        mask[1, :5] = 0
        model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
        assert held(model, cache) > new
        cache.reset()
        assert held(model, cache) == new

        hook = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(breaks)
        with pytest.raises(ArithmeticError):
            model(ids)
        hook.remove()
        with pytest.raises(UnsupportedError, match="does not run through PiKV"):
            cache.update(torch.ones(2, 2, 20, 16), torch.ones(2, 2, 20, 16), 1)  # and no attention takes them
        cache.reset()
        assert held(model, cache) == new

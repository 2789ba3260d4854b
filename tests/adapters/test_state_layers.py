"""Layers that keep a state (convolutions, recurrences) beside attention: the state follows rows as transformers' own cache moves it."""

import pytest
import torch
from transformers import DynamicCache

import pikv_ds
from pikv_ds.errors import UnsupportedError
from tests.dist.jobs.exact import assert_same, generate
from tests.long_form import short_or_long
from tests.survey.configs import tiny_config, tiny_model
from tests.tiny_models import prompt
from tests.tiny_models import tiny_model as small

BLOCK = {"page_size": 4, "storage": {"num_shards": 2}}
# A convolution; a state and keys in one layer; long: a recurrence too, which has tests of its own.
FAMILIES = short_or_long(["lfm2_moe", "falcon_h1"], ["lfm2_moe", "falcon_h1", "qwen3_next"])


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return tiny_model(tiny_config(request.param))


@pytest.fixture(scope="module")
def recurrent():
    return small("qwen3_next")


def test_beams_take_their_states_along(model):
    ids = prompt(9, seed=4, batch=2)
    options = dict(max_new_tokens=6, num_beams=3, num_return_sequences=2, do_sample=False, eos_token_id=None)
    plain = model.generate(ids, **options)
    with pikv_ds.attach(model, BLOCK):
        assert torch.equal(model.generate(ids, **options), plain)


def test_one_generation_after_another_of_another_size(model):
    with pikv_ds.attach(model, BLOCK) as cache:
        got = [generate(model, prompt(n, seed=n, batch=b), new_tokens=5) for n, b in ((9, 2), (6, 3), (12, 1))]
        assert cache.stats()["state_bytes"] > 0
        cache.reset()
        assert cache.stats()["state_bytes"] == 0
        again = generate(model, prompt(9, seed=9, batch=2), new_tokens=5)
    for run, (n, b) in zip([*got, again], ((9, 2), (6, 3), (12, 1), (9, 2)), strict=True):
        assert_same(run, generate(model, prompt(n, seed=n, batch=b), new_tokens=5), 1e-5)


@torch.no_grad()
def test_rows_are_chosen_repeated_and_reordered(model):
    ids, more = prompt(8, seed=5, batch=3), prompt(2, seed=6, batch=4)

    def steps(cache):
        model(ids, past_key_values=cache)
        cache.reorder_cache(torch.tensor([2, 0]))
        return [model(more[:2, :1], past_key_values=cache).logits, model(more[:2, 1:], past_key_values=cache).logits]

    plain = steps(DynamicCache(config=model.config))
    with pikv_ds.attach(model, BLOCK) as cache:
        got = steps(cache)
        model(ids, past_key_values=(own := cache.new_cache()))
        own.batch_repeat_interleave(2)
        own.batch_select_indices(torch.tensor([4, 1]))
        torch.testing.assert_close(model(more[:2, :1], past_key_values=own).logits, plain[0], rtol=0, atol=1e-5)
    for one, other in zip(got, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_recurrence_can_not_forget(recurrent):
    with pikv_ds.attach(recurrent, BLOCK) as cache:
        recurrent(prompt(8, seed=5), past_key_values=cache)
        with pytest.raises(UnsupportedError, match="a recurrent state can't forget tokens"):
            cache.crop(-2)
        assert recurrent(prompt(1, seed=6), past_key_values=cache).logits.isfinite().all()


@torch.no_grad()
def test_a_forward_that_only_keeps_step_leaves_states_alone(recurrent):
    ids = prompt(9, seed=5)
    own = DynamicCache(config=recurrent.config)
    plain = [recurrent(part, past_key_values=own).logits for part in ids.split([8, 1], 1)]
    with pikv_ds.attach(recurrent, BLOCK) as cache:
        first = recurrent(ids[:, :8], past_key_values=cache).logits
        hidden = torch.ones(1, 9, dtype=torch.int64)
        hidden[0, 8] = 0
        recurrent(torch.zeros(1, 1, dtype=torch.int64), attention_mask=hidden, past_key_values=cache)
        second = recurrent(ids[:, 8:], past_key_values=cache).logits
    torch.testing.assert_close(first, plain[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(second, plain[1], rtol=0, atol=1e-5)


@torch.no_grad()
def test_several_conversations_have_states_of_their_own(recurrent):
    texts = [prompt(7, seed=n) for n in (1, 2)]
    plain = [generate(recurrent, ids, new_tokens=4).logits for ids in texts]
    with pikv_ds.attach(recurrent, BLOCK) as attached:
        caches = [attached.new_cache() for _ in texts]
        got = [[recurrent(ids, past_key_values=cache).logits[:, -1]] for ids, cache in zip(texts, caches, strict=True)]
        for _ in range(3):
            for logits, cache in zip(got, caches, strict=True):
                logits.append(recurrent(logits[-1].argmax(-1, keepdim=True), past_key_values=cache).logits[:, -1])
    for one, other in zip(got, plain, strict=True):
        torch.testing.assert_close(torch.stack(one), other, rtol=0, atol=1e-5)

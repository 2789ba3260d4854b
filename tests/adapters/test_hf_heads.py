"""Base models and models with another head than a vocabulary: as plain transformers, with a cache that is used and given back."""

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification, DynamicCache

import pikv_ds
from tests.tiny_models import prompt, tiny_model

HEADS = {"base": AutoModel, "sequences": AutoModelForSequenceClassification, "tokens": AutoModelForTokenClassification}
BLOCK = {"page_size": 4, "storage": {"num_shards": 2}}


def headed(kind: str, family: str = "qwen3_moe", **changes):
    config = tiny_model(family, **changes).config
    torch.manual_seed(0)
    return HEADS[kind].from_config(config, attn_implementation="eager").eval()


def first(output) -> torch.Tensor:
    return output.logits if "logits" in output else output.last_hidden_state


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("kind", HEADS)
@torch.no_grad()
def test_a_head_is_exact_with_padding(kind, family):
    model = headed(kind, family, num_labels=1)
    ids, mask = prompt(13, seed=3, batch=3), torch.ones(3, 13, dtype=torch.int64)
    mask[1, :4], ids[1, :4] = 0, 0
    mask[2, 9:], ids[2, 9:] = 0, 0
    plain = first(model(ids, attention_mask=mask))
    before = {name: value for name, value in vars(model).items() if not name.startswith("_")}
    with pikv_ds.attach(model, BLOCK) as cache:
        got = first(model(ids, attention_mask=mask))
        assert cache.stats()["entries_appended"] == int(mask.sum()) * model.config.num_hidden_layers
    shown = slice(None) if kind == "sequences" else mask.bool()
    torch.testing.assert_close(got[shown], plain[shown], rtol=0, atol=1e-5)
    assert before == {name: value for name, value in vars(model).items() if not name.startswith("_")}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@torch.no_grad()
def test_a_base_model_goes_on_from_its_cache():
    model, ids = headed("base"), prompt(13, seed=3, batch=2)
    own = DynamicCache(config=model.config)
    plain = [model(part, past_key_values=own).last_hidden_state for part in ids.split([6, 5, 1, 1], 1)]
    with pikv_ds.attach(model, BLOCK) as cache:
        got = [model(part, past_key_values=cache).last_hidden_state for part in ids.split([6, 5, 1, 1], 1)]
    for one, other in zip(got, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_reward_model_scores_one_prompt_after_another():
    model = headed("sequences", num_labels=1)
    prompts = [prompt(n, seed=n) for n in (5, 9, 3)]
    plain = [model(ids).logits for ids in prompts]
    with pikv_ds.attach(model, BLOCK):
        got = [model(ids).logits for ids in prompts]
    torch.testing.assert_close(torch.cat(got), torch.cat(plain), rtol=0, atol=1e-5)


def test_attach_twice_says_so_also_without_generate():
    model = headed("base")
    with pikv_ds.attach(model, {}), pytest.raises(pikv_ds.errors.UnsupportedError, match="attached already"):
        pikv_ds.attach(model, {})
    pikv_ds.attach(model, {}).detach()

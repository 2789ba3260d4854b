"""What cannot be honoured is refused by name, at attach or at the call; never ignored."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma2Config,
    LlamaConfig,
    Qwen3NextConfig,
    T5Config,
    T5ForConditionalGeneration,
)

import pikv_ds
from pikv_ds.errors import ConfigError, UnsupportedError
from tests.survey.configs import tiny_config
from tests.survey.configs import tiny_model as survey_model
from tests.tiny_models import prompt, tiny_model

SMALL = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen3_moe")


@pytest.fixture
def cache(model):
    with pikv_ds.attach(model, {"page_size": 4}) as cache:
        yield cache


def test_no_layer_with_keys_and_values():
    config = Qwen3NextConfig(**SMALL, head_dim=16, num_experts=4, linear_num_key_heads=2, linear_num_value_heads=2)
    with pytest.raises(UnsupportedError, match=r"no layer with keys and values \(linear_attention\): there is nothing to store"):
        pikv_ds.attach(AutoModelForCausalLM.from_config(config), {})


def test_other_layer_types():
    with pytest.raises(UnsupportedError, match=r"indexed_attention \(layers 0, 1\); PiKV stores full and sliding attention"):
        pikv_ds.attach(survey_model(tiny_config("deepseek_v32")), {})


def test_softcap_with_a_codec_that_maps_keys():
    model = AutoModelForCausalLM.from_config(Gemma2Config(**SMALL, head_dim=16, attn_logit_softcapping=50.0))
    with pytest.raises(ConfigError, match=r"layer 0 bounds its scores \(softcap 50.0\), and .* = 'svd' maps keys"):
        pikv_ds.attach(model, {"compression": {"method": "svd", "rank": 8}})


def test_encoder_decoder():
    model = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2))
    with pytest.raises(UnsupportedError):
        pikv_ds.attach(model, {})


@pytest.mark.parametrize("wrapped", [nn.Linear(2, 2), nn.Sequential()], ids=["linear", "sequential"])
def test_not_a_model(wrapped):
    with pytest.raises(UnsupportedError, match="PreTrainedModel.*engine.module"):
        pikv_ds.attach(wrapped, {})


def test_dtype(model):
    odd = tiny_model("qwen3_moe")
    odd.model.embed_tokens.weight.data = odd.model.embed_tokens.weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(UnsupportedError, match="float8_e4m3fn.*float32, bfloat16, float16"):
        pikv_ds.attach(odd, {})


def test_attached_twice(model, cache):
    with pytest.raises(UnsupportedError, match="attached already"):
        pikv_ds.attach(model, {})


def test_disabled_block(model):
    with pytest.raises(ConfigError, match="pikv.enabled is false"):
        pikv_ds.attach(model, {"enabled": False})


def test_table_of_another_model(model):
    with pytest.raises(ValueError, match="8 experts"):
        pikv_ds.attach(model, {"storage": {"num_shards": 2, "placement": "table", "table": [[[0], [1]]]}})


def test_gate_file_missing_or_of_another_shape(model, tmp_path):
    from safetensors.torch import save_file

    path = str(tmp_path / "gate.safetensors")
    block = {"storage": {"expert_ids": "gate", "gate_path": path}}
    with pytest.raises(ConfigError, match="gate_path"):
        pikv_ds.attach(model, block)
    save_file({"gate": torch.zeros(1, 2, 3)}, path)
    with pytest.raises(ConfigError, match=r"gate_path.*\(1, 2, 3\).*\(2, 8, 32\)"):
        pikv_ds.attach(model, block)


def test_masks_that_are_neither_padding_nor_one_per_token(model, cache):
    with pytest.raises(UnsupportedError, match=r"attention_mask is \(1, 6, 6\)"):
        model(prompt(6, seed=1), attention_mask=torch.ones(1, 6, 6, dtype=torch.bool).tril())
    with pytest.raises(UnsupportedError, match="adds something else than 0 or the lowest number"):
        model(prompt(6, seed=1), attention_mask=torch.randn(1, 1, 6, 6))


def test_padding_that_a_later_forward_does_not_mention(model, cache):
    ids, mask = prompt(6, seed=1), torch.tensor([[0, 0, 1, 1, 1, 1]])
    model(ids, attention_mask=mask)
    with pytest.raises(UnsupportedError, match="no attention_mask, but the cache has columns that are hidden"):
        model(ids[:, :1], past_key_values=cache)


def test_mask_of_the_wrong_length(model, cache):
    with pytest.raises(UnsupportedError, match=r"must be \[1, 6\]"):
        model(prompt(6, seed=1), attention_mask=torch.ones(1, 9, dtype=torch.int64))


def test_mask_that_hides_cached_tokens(model, cache):
    ids = prompt(6, seed=1)
    model(ids)
    mask = torch.ones(1, 7, dtype=torch.int64)
    mask[0, 2] = 0
    with pytest.raises(UnsupportedError, match="can't hide or reveal cached tokens"):
        model(ids[:, :1], attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("argument", ["cu_seq_lens_q", "position_bias", "head_mask"])
def test_attention_arguments_by_name(argument, model, cache):
    with pytest.raises(UnsupportedError, match=f"{argument}.*does not handle it"):
        model(prompt(6, seed=1), **{argument: torch.ones(3)})


def test_softcap_that_the_layer_does_not_have(model, cache):
    with pytest.raises(UnsupportedError, match="softcap 1.0, but its configuration says None"):
        model(prompt(6, seed=1), softcap=1.0)


def test_states_of_an_encoder(model, cache):
    with pytest.raises(UnsupportedError, match="encoder_hidden_states is set"):
        model(prompt(6, seed=1), encoder_hidden_states=torch.ones(1, 4, 64))


def test_attention_weights(model, cache):
    with pytest.raises(UnsupportedError, match="output_attentions"):
        model(prompt(6, seed=1), output_attentions=True)


def test_another_cache(model, cache):
    with pytest.raises(UnsupportedError, match="DynamicCache"):
        model(prompt(6, seed=1), past_key_values=DynamicCache())


def test_another_cache_implementation(model, cache):
    with pytest.raises(UnsupportedError, match="cache_implementation = 'static'"):
        model.generate(prompt(6, seed=1), max_new_tokens=2, cache_implementation="static")


def test_another_batch(model, cache):
    model(prompt(6, seed=1, batch=2))
    with pytest.raises(UnsupportedError, match="3 rows, the cache 2"):
        model(prompt(1, seed=1, batch=3), past_key_values=cache)


def test_failed_forward_must_be_reset(model, cache):
    ids = prompt(6, seed=1)
    model(ids)
    with pytest.raises(UnsupportedError):
        model(ids[:, :1], past_key_values=cache, softcap=1.0)
    with pytest.raises(RuntimeError, match=r"failed midway.*reset\(\)"):
        model(ids[:, :1], past_key_values=cache)
    cache.reset()
    assert model(ids).logits.isfinite().all()


def test_router_of_experts_on_a_dense_model():
    dense = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL)).eval()
    with pytest.raises(ConfigError, match="'experts' reads the shard of the query's expert, and LlamaForCausalLM is a dense model"):
        pikv_ds.attach(dense, {"routing": {"method": "experts"}})


def test_dropout(cache):
    dense = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, attention_dropout=0.5)).eval()
    with pikv_ds.attach(dense, {}) as own, pytest.raises(UnsupportedError, match="train mode"):
        dense.train()(prompt(4, seed=1) % 64, past_key_values=own)

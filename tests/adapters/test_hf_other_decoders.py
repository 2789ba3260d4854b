"""Decoders beyond the named families: exact when their layers use the standard attention interface, else refused. Never silently wrong."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import pikv_ds
from pikv_ds.errors import UnsupportedError
from tests.dist.jobs.exact import assert_same, generate
from tests.host_guard import host_is_forbidden
from tests.tiny_models import prompt

SMALL = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
GROUPED = SMALL | dict(num_key_value_heads=2, head_dim=16)
EXPERTS = GROUPED | dict(num_local_experts=4, num_experts=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
DECODERS = {
    "llama": GROUPED,
    "mistral": GROUPED,
    "phi3": GROUPED,
    "gemma3_text": GROUPED,
    "olmo3": GROUPED,
    "cohere": GROUPED,
    "smollm3": GROUPED,
    "granitemoe": EXPERTS,
    "minimax_m2": EXPERTS,
    "phimoe": EXPERTS,
    "glm4_moe": EXPERTS | dict(n_group=1, topk_group=1, first_k_dense_replace=1),
    "gpt_neox": SMALL,
    "persimmon": GROUPED,  # its modules know nothing of num_key_value_heads
    "opt": SMALL | dict(ffn_dim=96, word_embed_proj_dim=64),
    "gpt2": dict(vocab_size=128, n_embd=64, n_layer=2, n_head=4),
}


def tiny(model_type: str, settings: dict):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **settings)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).eval().float()
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.08)
    return model


@pytest.mark.parametrize("model_type", DECODERS)
def test_decoder_is_exact(model_type):
    model = tiny(model_type, DECODERS[model_type])
    ids = prompt(24, seed=2, batch=2)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    reference = generate(model, ids, mask, new_tokens=16)
    with pikv_ds.attach(model, {"page_size": 4, "storage": {"num_shards": 3}}) as cache, host_is_forbidden(model):
        run = generate(model, ids, mask, new_tokens=16)
        assert cache.stats()["entries_appended"] == 2 * (24 + 17 + 2 * 15)
    assert_same(run, reference, 1e-5)


REFUSED = {
    "jetmoe": (GROUPED | dict(num_local_experts=4), "changes keys or values between the cache and attention"),
    "bloom": (dict(vocab_size=128, hidden_size=64, n_layer=2, n_head=4), "AttentionInterface"),
    "llama4_text": (EXPERTS, "chunked_attention"),
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_decoder_is_refused(model_type):
    settings, message = REFUSED[model_type]
    model = tiny(model_type, settings)
    with pytest.raises(UnsupportedError, match=message), pikv_ds.attach(model, {}):
        model.generate(prompt(8, seed=2), max_new_tokens=2)

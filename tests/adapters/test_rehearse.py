"""A rehearsal shows the policy kvzip what the model looks at to repeat its prompt, and leaves nothing else behind."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import pikv_ds
from pikv_ds import bundled
from pikv_ds.adapters.hf.rehearse import rehearse
from pikv_ds.cache.inspect import CacheProbe
from pikv_ds.errors import ConfigError
from tests.tiny_models import prompt as random_prompt
from tests.tiny_models import tiny_model

SMALL = {"sink_tokens": 2, "recent_tokens": 8, "prefill": "keep"}
TOKENS, PAGE = 100, 8


@pytest.fixture(scope="module")
def prompt() -> tuple:
    model, tokenizer = bundled.load()
    ids = tokenizer(bundled.haystack(), add_special_tokens=False, verbose=False)["input_ids"]
    return model, torch.tensor([ids[:TOKENS], ids[500 : 500 + TOKENS]])


def block(**scheduling) -> dict:
    return {"page_size": PAGE, "scheduling": {"method": "kvzip", "budget_ratio": 1.0, **SMALL} | scheduling}


def peaks_of(attention: torch.Tensor, tokens: int, page: int = PAGE) -> torch.Tensor:
    """Of dense attention [Hq, query, entry] the largest share, mean over heads, of a query after the prompt in each full page of it."""
    return attention[:, tokens:, : tokens // page * page].mean(0).unflatten(1, (-1, page)).sum(-1).amax(0)


@torch.no_grad()
def fed(model, cache, ids):
    for part in ids.split(32, 1):
        logits = model(part, past_key_values=cache).logits
    return logits[:, -1:].argmax(-1)


@torch.no_grad()
def test_peaks_are_those_of_dense_attention_and_nothing_stays(prompt):
    model, ids = prompt
    eager = AutoModelForCausalLM.from_pretrained(bundled.model_path(), dtype=torch.float32, attn_implementation="eager").eval()
    attentions = eager(torch.cat([ids, ids[:, 1:]], 1), output_attentions=True).attentions
    with pikv_ds.attach(model, block()) as cache:
        token = fed(model, cache, ids)
        plain = model(token, past_key_values=cache).logits
    with pikv_ds.attach(model, block()) as cache:
        token = fed(model, cache, ids)
        rehearse(model, cache, ids[:, 1:])
        for layer, (pool, attention) in enumerate(zip(CacheProbe(cache.core).all_pools, attentions, strict=True)):
            for row in range(len(ids)):
                peaks = peaks_of(attention[row], TOKENS)
                found = pool.column("peak")[pool.page_ids(row, 0)[: len(peaks)]]
                assert torch.allclose(found, peaks, atol=1e-4), (layer, row)
        assert torch.allclose(model(token, past_key_values=cache).logits, plain, atol=1e-4)
        assert cache.stats()["entries_live"] == len(ids) * 4 * (TOKENS + 1)


@torch.no_grad()
def test_layers_with_a_window_have_no_peaks():
    model = tiny_model("qwen3_dense", use_sliding_window=True, sliding_window=16, layer_types=["sliding_attention", "full_attention"])
    ids = random_prompt(48, seed=3, batch=2)
    attention = model(torch.cat([ids, ids[:, 1:]], 1), output_attentions=True).attentions[1]
    with pikv_ds.attach(model, block()) as cache:
        token = fed(model, cache, ids)
        plain = model(token, past_key_values=cache).logits
    with pikv_ds.attach(model, block()) as cache:
        token = fed(model, cache, ids)
        rehearse(model, cache, ids[:, 1:])
        pool = CacheProbe(cache.core).near_pool(1)
        for row in range(len(ids)):
            found = pool.column("peak")[pool.page_ids(row, 0)[: 48 // PAGE]]
            assert torch.allclose(found, peaks_of(attention[row], 48), atol=1e-4), row
        assert torch.allclose(model(token, past_key_values=cache).logits, plain, atol=1e-4)


@torch.no_grad()
def test_peaks_of_far_pages_are_those_of_the_rehearsal(prompt):
    """Pages that int8 has encoded: their first peaks, of the prompt itself, do not count any more."""
    model, ids = prompt
    eager = AutoModelForCausalLM.from_pretrained(bundled.model_path(), dtype=torch.float32, attn_implementation="eager").eval()
    attentions = eager(torch.cat([ids, ids[:, 1:]], 1), output_attentions=True).attentions
    coded = {"page_size": 32, "compression": {"method": "int8", "group": 32, "raw_recent_tokens": 16}}
    with pikv_ds.attach(model, block() | coded) as cache:
        fed(model, cache, ids)
        rehearse(model, cache, ids[:, 1:])
        for layer, attention in enumerate(attentions):
            far = CacheProbe(cache.core).far_pool(layer)
            for row in range(len(ids)):
                assert [page[0] for page in far.pages(row)] == [0, 32]
                assert torch.allclose(far.column("peak")[far.page_ids(row, 0)], peaks_of(attention[row], TOKENS, 32)[:2], atol=0.01), layer


def test_a_column_that_nobody_keeps(prompt):
    with pikv_ds.attach(prompt[0], block()) as cache, pytest.raises(ValueError, match=r"'used' per page; kept are \['peak'\]"):
        cache.core.clear_column("used")


@torch.no_grad()
def test_eviction_follows_the_peaks(prompt):
    model, ids = prompt
    with pikv_ds.attach(model, block(budget_ratio=0.5)) as cache:
        token = fed(model, cache, ids)
        rehearse(model, cache, ids[:, 1:])
        pool = CacheProbe(cache.core).near_pool(0)
        peaks = pool.column("peak")[pool.page_ids(0, 0)[: TOKENS // PAGE]].tolist()
        model(token, past_key_values=cache)
        kept = {page[0] // PAGE for page in CacheProbe(cache.core).pages(0, 0)}
    free = [i for i in range(1, TOKENS // PAGE) if (i + 1) * PAGE <= TOKENS + 1 - 8]
    gone = set(free) - kept
    assert gone == set(sorted(free, key=peaks.__getitem__)[: len(gone)]) and len(gone) >= 5


def test_refusals(prompt):
    model, ids = prompt
    for scheduling, said in [({"method": "h2o"}, "method = 'kvzip'"), ({"prefill": "evict"}, "prefill = 'keep'")]:
        with pikv_ds.attach(model, block(**scheduling)) as cache:
            fed(model, cache, ids)
            with pytest.raises(ConfigError, match=said):
                rehearse(model, cache, ids)

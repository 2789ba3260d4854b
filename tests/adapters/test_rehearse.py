"""A rehearsal shows the policy kvzip what the model looks at to repeat its prompt, and leaves nothing else behind."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import pikv_ds
from pikv_ds import bundled
from pikv_ds.adapters.hf.rehearse import rehearse
from pikv_ds.errors import ConfigError

SMALL = {"sink_tokens": 2, "recent_tokens": 8, "prefill": "keep"}
TOKENS, PAGE = 100, 8


@pytest.fixture(scope="module")
def prompt() -> tuple:
    model, tokenizer = bundled.load()
    ids = tokenizer(bundled.haystack(), add_special_tokens=False, verbose=False)["input_ids"]
    return model, torch.tensor([ids[:TOKENS], ids[500 : 500 + TOKENS]])


def block(**scheduling) -> dict:
    return {"page_size": PAGE, "scheduling": {"method": "kvzip", "budget_ratio": 1.0, **SMALL} | scheduling}


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
        for layer, (store, attention) in enumerate(zip(cache.core.tables.stores, attentions, strict=True)):
            for row in range(len(ids)):
                share = attention[row, :, TOKENS:, : TOKENS // PAGE * PAGE].mean(0).unflatten(1, (-1, PAGE)).sum(-1)
                found = store.summaries["peak"][store.block_table[row, 0, : share.shape[1]].long()]
                assert torch.allclose(found, share.amax(0), atol=1e-4), (layer, row)
        assert torch.allclose(model(token, past_key_values=cache).logits, plain, atol=1e-4)
        assert cache.stats()["entries_live"] == len(ids) * 4 * (TOKENS + 1)


@torch.no_grad()
def test_eviction_follows_the_peaks(prompt):
    model, ids = prompt
    with pikv_ds.attach(model, block(budget_ratio=0.5)) as cache:
        token = fed(model, cache, ids)
        rehearse(model, cache, ids[:, 1:])
        store = cache.core.tables.stores[0]
        peaks = store.summaries["peak"][store.block_table[0, 0, : TOKENS // PAGE].long()].tolist()
        model(token, past_key_values=cache)
        store = cache.core.tables.stores[0]
        pages = store.block_table[0, 0]
        kept = {int(first) // PAGE for first in store.positions[pages[pages >= 0].long()][:, 0]}
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

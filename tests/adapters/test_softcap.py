"""Layers that bound their scores: read in torch, by whole pools, page by page and under a router. Exact, and said in stats()."""

import pytest
import torch

import pikv_ds
from tests.dist.jobs.exact import assert_same, generate
from tests.tiny_models import prompt, tiny_model

BLOCKS = {
    "pages": {"page_size": 4},
    "a router that reads them all": {"page_size": 4, "routing": {"method": "bounds", "budget_pages": 400}},
    "a budget that holds all": {"page_size": 4, "scheduling": {"method": "knorm", "budget_tokens": 400}},
}


@pytest.fixture(scope="module")
def model():
    return tiny_model("gemma2")


@pytest.mark.parametrize("name", BLOCKS)
def test_bounded_scores_are_exact(name, model):
    ids = prompt(24, seed=1, batch=2)
    plain = generate(model, ids, new_tokens=8)
    with pikv_ds.attach(model, BLOCKS[name] | {"storage": {"num_shards": 2}}) as cache:
        assert_same(generate(model, ids, new_tokens=8), plain, 1e-5)
        assert cache.stats()["attention_impl"] == "pikv torch fp32"


def test_the_bound_matters_here(model):
    """Without it these scores would give other logits, so that the tests above can fail."""
    loose = tiny_model("gemma2", attn_logit_softcapping=50.0)
    ids = prompt(24, seed=1)
    with torch.no_grad():
        assert (model(ids).logits - loose(ids).logits).abs().max() > 1e-3

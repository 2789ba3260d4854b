"""Rows of a cache, chosen, dropped and repeated between forwards, as transformers' own cache moves them."""

import pytest
import torch
from transformers import DynamicCache

import pikv_ds
from tests.tiny_models import prompt, tiny_model

LENGTH, MORE = 8, (1, 1, 4)


@pytest.mark.parametrize("num_shards", [1, 4])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("index", [[0], [0, 1], [2], [1, 2], [0, 0, 1, 1, 2, 2], [0, 1, 2]], ids=str)
@torch.no_grad()
def test_rows_go_on_as_plain(family, num_shards, index):
    """[0] and [0, 1] drop the last rows and leave the others where they are."""
    model = tiny_model(family)
    ids, more = prompt(LENGTH, seed=5, batch=3), prompt(sum(MORE), seed=6, batch=len(index))

    def steps(cache):
        model(ids, past_key_values=cache)
        cache.batch_select_indices(torch.tensor(index))
        return torch.cat([model(chunk, past_key_values=cache).logits for chunk in more.split(MORE, 1)], 1)

    expected = steps(DynamicCache(config=model.config))
    with pikv_ds.attach(model, {"page_size": 4, "storage": {"num_shards": num_shards}}) as cache:
        torch.testing.assert_close(steps(cache), expected, rtol=0, atol=1e-5)
        entries, whole = cache.stats()["entries_live"], model.config.num_hidden_layers * len(index) * (LENGTH + sum(MORE))
    assert entries == whole if family == "qwen3_moe" else entries <= whole  # gpt_oss has a layer with a window

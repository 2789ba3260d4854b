import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pikv_ds.codecs import CODECS
from pikv_ds.pages.estimate import dense_bytes, max_pages, paper_min_bytes, paper_shard_capacity, pikv_bytes
from pikv_ds.spec import LayerSpec

FULL = LayerSpec(layer_idx=0, num_kv_heads=2, k_dim=32, v_dim=32)
SLIDING = LayerSpec(layer_idx=1, num_kv_heads=2, k_dim=32, v_dim=32, window=128)
LATENT = LayerSpec(layer_idx=2, num_kv_heads=1, k_dim=576, v_dim=512, latent=True)
NONE = CODECS.build("none")


def test_values_per_token():
    assert (FULL.values_per_token, SLIDING.values_per_token, LATENT.values_per_token) == (128, 128, 576)


def test_dense_bytes_by_hand():
    assert dense_bytes([FULL], [1024], 4) == 1024 * 128 * 4
    assert dense_bytes([SLIDING], [1024, 100], 2) == (127 + 100) * 128 * 2
    assert dense_bytes([FULL, LATENT], [10], 2) == 10 * (128 + 576) * 2


def test_compressed_pages_and_raw_tails_by_hand():
    """int4 of 2 heads x (32 + 32): codes, K scales and zeros of one group, V scales and zeros, positions; the tail is raw keys."""
    codec = CODECS.build("int4")
    page = 2 * (64 * 16 + 64 * 16 + 2 * 2 * 32 + 2 * 2 * 64) + 4 * 64
    made = pikv_bytes([FULL], [1024, 64], ranks=2, codec=codec, page_size=64, dtype=torch.bfloat16)
    assert made.balanced == (8 + 1) * page + 2 * (2 * 64 * 32 * 2)


def test_pikv_bytes_by_hand():
    made = pikv_bytes([FULL], [1024], ranks=2, codec=NONE, page_size=32, dtype=torch.float32)
    assert made.balanced == 512 * (128 * 4 + 4)
    # ceil(1.1 * 512) + 32 = 596 slots touch at most 19 pages
    assert made.worst == 19 * 32 * (128 * 4 + 4)


def test_one_rank_holds_everything_and_shards_may_outnumber_ranks():
    one = pikv_bytes([FULL], [64], ranks=1, codec=NONE, page_size=16, dtype=torch.float32)
    assert one.balanced == 64 * 516
    three_shards = pikv_bytes([FULL], [96], ranks=2, num_shards=3, codec=NONE, page_size=16, dtype=torch.float32)
    assert three_shards.balanced == 2 * 32 * 516


def test_sliding_layers_may_touch_one_page_more():
    # 127 kept tokens over 2 shards: 64 in one, which span up to 5 pages of 16 after old entries left
    made = pikv_bytes([SLIDING], [1024], ranks=2, codec=NONE, page_size=16, dtype=torch.float32)
    assert made.balanced == 5 * 16 * 516
    short = pikv_bytes([SLIDING], [127], ranks=2, codec=NONE, page_size=16, dtype=torch.float32)
    assert short.balanced == 4 * 16 * 516


def test_empty_requests_cost_nothing_when_balanced():
    assert pikv_bytes([FULL], [0], ranks=2, codec=NONE, page_size=32, dtype=torch.float32).balanced == 0


@given(
    entries=st.lists(st.integers(0, 60), min_size=1, max_size=5),
    page_size=st.integers(1, 17),
    gone=st.integers(0, 16),
    sliding=st.booleans(),
)
def test_max_pages_bounds_any_arrangement(entries, page_size, gone, sliding):
    skip = gone % page_size if sliding else 0
    used = sum(math.ceil((n + skip) / page_size) - (skip // page_size) for n in entries if n)
    assert used <= max_pages(sum(entries), page_size, requests=len(entries), sliding=sliding)


@given(
    context=st.integers(1, 5000),
    ranks=st.sampled_from([1, 2, 4]),
    page_size=st.integers(1, 64),
    batch=st.integers(1, 4),
)
def test_worst_is_at_least_balanced_and_balanced_at_least_the_share(context, ranks, page_size, batch):
    layers, contexts = [FULL, SLIDING, LATENT], [context] * batch
    made = pikv_bytes(layers, contexts, ranks=ranks, codec=NONE, page_size=page_size, dtype=torch.bfloat16)
    assert made.worst >= made.balanced >= dense_bytes(layers, contexts, 2) / ranks


@pytest.mark.parametrize("tokens, kept, ranks", [(1024, 8, 2), (65536, 64, 8)])
def test_the_papers_optimum_is_the_minimum_of_its_model(tokens, kept, ranks):
    def model(capacity):  # numbers; 2 d = values_per_token
        return FULL.values_per_token * (tokens / (ranks * capacity) + kept * capacity)

    best = paper_shard_capacity(tokens, kept, ranks)
    assert model(best) == pytest.approx(paper_min_bytes(FULL, tokens, kept, ranks, itemsize=1))
    assert model(best) < min(model(best * 1.01), model(best * 0.99))

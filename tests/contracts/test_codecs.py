"""What every registered codec keeps. A codec needs no test of its own to be held to this."""

import inspect

import pytest
import torch

from pikv_ds import ops
from pikv_ds.codecs import CODECS
from pikv_ds.codecs.base import Codec
from pikv_ds.reader import read_pages
from pikv_ds.spec import LayerSpec
from pikv_ds.store import LayerStore

pytestmark = pytest.mark.parametrize("name", CODECS.names())
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# KV heads, key width, value width, latent
SHAPES = [(2, 32, 32, False), (1, 64, 64, False), (4, 128, 128, False), (8, 96, 96, False), (1, 576, 512, True)]
PAGES = 2  # full pages that are followed by an open one


def spec(shape) -> LayerSpec:
    heads, k_dim, v_dim, latent = shape
    return LayerSpec(layer_idx=0, num_kv_heads=heads, k_dim=k_dim, v_dim=v_dim, latent=latent)


def filled(name, shape, dtype, tokens=None):
    """A store of one row with `tokens` entries (default: two pages and a bit), and what was put into it."""
    codec, layer = CODECS.build(name), spec(shape)
    page_size = codec.page_size(None)
    tokens = PAGES * page_size + 5 if tokens is None else tokens
    store = LayerStore(codec.page_format(layer, page_size, dtype), dtype, torch.device("cpu"), torch.zeros(1, 1, dtype=torch.int32),
                       torch.zeros((), dtype=torch.int64))  # fmt: skip
    generator = torch.Generator().manual_seed(tokens)
    k = (torch.randn(tokens, layer.num_kv_heads, layer.k_dim, generator=generator) + 3).to(dtype)
    v = torch.randn(tokens, layer.num_kv_heads, layer.stored_v_dim, generator=generator).to(dtype)
    store.reserve(0, -(-tokens // page_size), -(-tokens // page_size))
    if tokens:
        rows, here = torch.zeros(tokens, dtype=torch.int64), torch.ones(tokens, dtype=torch.bool)
        positions = torch.arange(tokens, dtype=torch.int32)
        store.append(rows, None, here, positions, k, v, one_per_row=False, may_open=True, all_valid=True)
    return store, k, v


def decoded(store):
    """k [tokens, Hkv, Dk], v [tokens, Hkv, Dv] f32 as the pages and the tail hold them."""
    tokens, fmt = int(store.counts.sum()), store.fmt
    k, v = ops.decode_pages(store.pages[store.block_table[0, 0, :-1].long()], fmt)
    k, v = (x.transpose(1, 2).flatten(0, 1)[:tokens].clone() for x in (k, v))
    if store.tail is not None and tokens % fmt.group:
        k[tokens - tokens % fmt.group :] = store.tail[0, :, : tokens % fmt.group].transpose(0, 1).float()
    return k, k[..., : fmt.v_dim] if fmt.latent else v


def rel_error(found, wanted):
    norm = wanted.double().norm()
    return 0.0 if norm == 0 else ((found.double() - wanted.double()).norm() / norm).item()


def test_is_described(name):
    codec = CODECS.get(name)
    assert issubclass(codec, Codec) and codec.name == name
    assert 1 <= CODECS.build(name).preferred_page_size <= 256
    assert "Bytes per token" in inspect.getdoc(codec)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trip_within_the_declared_error(name, shape, dtype):
    store, k, v = filled(name, shape, dtype)
    k_back, v_back = decoded(store)
    wanted_v = k[..., : store.fmt.v_dim] if store.fmt.latent else v
    if CODECS.get(name).lossless:
        assert torch.equal(k_back, k.float()) and torch.equal(v_back, wanted_v.float())
    else:
        assert 0 < rel_error(k_back, k) <= store.fmt.k_rel_error
        assert 0 < rel_error(v_back, wanted_v) <= store.fmt.v_rel_error


@pytest.mark.parametrize("tokens", [0, 1, 63, 64, 65, 200])
@pytest.mark.parametrize("queries", [1, 3, 40], ids="T{}".format)
@pytest.mark.parametrize("group", [1, 4, 8], ids="G{}".format)
def test_attend_equals_decode_then_attend(name, group, queries, tokens):
    """decode, prefill_cached and the dense path read what the pages hold, and nothing else."""
    store, _, _ = filled(name, (2, 32, 32, False), torch.float32, tokens)
    q = torch.randn(1, queries, 2 * group, 32, generator=torch.Generator().manual_seed(group))
    if tokens == 0:
        assert store.num_pages == 0
        return
    k, v = decoded(store)
    want, want_lse = ops.sdpa_lse(q.transpose(1, 2), k.transpose(0, 1)[None], v.transpose(0, 1)[None], scale=0.2)
    out, lse = read_pages(
        store, q, slice(0, 1), None, None, scale=0.2, window=None, q_positions=torch.full((1, queries), tokens, dtype=torch.int32)
    )
    assert rel_error(out, want.transpose(1, 2)) < 2e-4 and (lse - want_lse.transpose(1, 2)).abs().max() < 1e-3


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_declared_bytes_are_allocated(name, shape):
    store, _, _ = filled(name, shape, torch.bfloat16)
    layer, fmt = spec(shape), store.fmt
    declared = (PAGES + 1) * fmt.page_size * (fmt.bytes_per_token + 4) + 2 * fmt.tail_elements
    assert store.nbytes == declared == sum(t.untyped_storage().nbytes() for t in (store.pages, store.tail) if t is not None)
    if not CODECS.get(name).lossless:
        assert fmt.bytes_per_token < 2 * layer.values_per_token, "a codec that saves nothing"


def test_not_finite_keys_stay_in_their_entry(name):
    """A NaN in one request's keys reaches no other request, and none that was there before."""
    layer, codec = spec((2, 32, 32, False)), CODECS.build(name)
    page_size = codec.page_size(None)
    fmt, counts = codec.page_format(layer, page_size, torch.float32), torch.zeros(2, 1, dtype=torch.int32)
    store = LayerStore(fmt, torch.float32, torch.device("cpu"), counts, torch.zeros((), dtype=torch.int64))
    store.reserve(0, 4, 2)
    rows = torch.arange(2).repeat_interleave(page_size)
    k = torch.randn(2 * page_size, 2, 32)
    k[3] = torch.nan
    k[5] = torch.inf
    here, positions = torch.ones(2 * page_size, dtype=torch.bool), torch.arange(page_size, dtype=torch.int32).repeat(2)
    store.append(rows, None, here, positions, k, k.clone(), one_per_row=False, may_open=True, all_valid=True)
    out, lse = read_pages(store, torch.randn(1, 1, 4, 32), slice(1, 2), None, None, scale=0.2, window=None, q_positions=None)
    assert bool(out.isfinite().all()) and bool(lse.isfinite().all())

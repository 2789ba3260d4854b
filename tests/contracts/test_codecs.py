"""What every registered codec keeps. A codec needs no test of its own to be held to this."""

import inspect

import pytest
import torch

from pikv_ds.codecs import CODECS
from pikv_ds.codecs.base import Codec

pytestmark = pytest.mark.parametrize("name", CODECS.names())

# tokens, KV heads, key width, value width (0: a latent layer stores no values beside its keys)
SHAPES = [(0, 2, 64, 64), (1, 1, 64, 64), (33, 4, 128, 128), (7, 8, 64, 64), (5, 1, 576, 0)]


def make(shape, dtype):
    tokens, heads, k_dim, v_dim = shape
    generator = torch.Generator().manual_seed(tokens)
    k = torch.randn(tokens, heads, k_dim, generator=generator).to(dtype)
    return k, torch.randn(tokens, heads, v_dim, generator=generator).to(dtype)


def rel_error(found, wanted):
    norm = wanted.double().norm()
    return 0.0 if norm == 0 else ((found.double() - wanted.double()).norm() / norm).item()


def test_is_described(name):
    codec = CODECS.get(name)
    assert issubclass(codec, Codec) and codec.name == name
    assert 1 <= codec.preferred_page_size <= 256
    assert codec.max_rel_error >= 0
    assert "Bytes per token" in inspect.getdoc(codec)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trip_within_the_declared_error(name, shape, dtype):
    codec = CODECS.build(name)
    k, v = make(shape, dtype)
    k_back, v_back = codec.decode(codec.encode(k, v))
    assert k_back.shape == k.shape and v_back.shape == v.shape
    assert k_back.dtype == v_back.dtype == dtype
    assert rel_error(k_back, k) <= codec.max_rel_error
    assert rel_error(v_back, v) <= codec.max_rel_error


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_counted_bytes_are_the_encoded_bytes(name, shape):
    codec = CODECS.build(name)
    fields = codec.encode(*make(shape, torch.bfloat16))
    tokens, *geometry = shape
    assert sum(field.numel() * field.element_size() for field in fields.values()) == tokens * codec.bytes_per_token(
        *geometry, itemsize=2
    )
    assert all(field.shape[0] == tokens for field in fields.values())

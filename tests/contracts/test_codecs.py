"""What every registered codec keeps. A codec needs no test of its own to be held to this."""

import inspect
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from pikv_ds import ops
from pikv_ds.codecs import CODECS
from pikv_ds.codecs.base import Codec, Heads
from pikv_ds.codecs.maps import Transform
from pikv_ds.errors import ConfigError
from pikv_ds.pages.pool import PagePool
from pikv_ds.pages.raw import RawReader
from pikv_ds.spec import LayerSpec
from pikv_ds.step.query import Partial

pytestmark = pytest.mark.parametrize("name", CODECS.names())
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# KV heads, key width, value width, latent
LATENT = (1, 40, 32, True)
SHAPES = [(2, 32, 32, False), (1, 64, 64, False), (4, 128, 128, False), (8, 96, 96, False), (1, 576, 512, True), LATENT]
PAGES = 2  # full pages that are followed by an open one


def spec(shape) -> LayerSpec:
    heads, k_dim, v_dim, latent = shape
    return LayerSpec(layer_idx=0, num_kv_heads=heads, k_dim=k_dim, v_dim=v_dim, latent=latent)


def sampled(shape, tokens, seed=0, dtype=torch.float32) -> Heads:
    """Keys with a mean, as models have them, values, and two query heads to each kv head."""
    layer, generator = spec(shape), torch.Generator().manual_seed(seed)
    draw = lambda heads, dim: torch.randn(tokens, heads, dim, generator=generator)  # noqa: E731
    k, v = (draw(layer.num_kv_heads, layer.k_dim) + 3).to(dtype), draw(layer.num_kv_heads, layer.stored_v_dim).to(dtype)
    return Heads(draw(2 * layer.num_kv_heads, layer.k_dim), k, v)


def made(name, shape, heads=None, rope_raw=None) -> Codec:
    """The codec with default options but rope_raw; if it must be, calibrated on `heads`, by default on a sample."""
    if rope_raw is False:
        if "rope_raw" not in inspect.signature(CODECS.get(name).__init__).parameters:
            pytest.skip("no such option")
        return CODECS.build(name, rope_raw=False)
    if spec(shape).latent and (CODECS.get(name).calibrated or CODECS.get(name).per_request):
        with pytest.raises(ValueError, match="stores a latent"):
            CODECS.get(name).example([sampled(SHAPES[0], 64)]).page_format(spec(shape), 64, torch.float32)
        pytest.skip("refuses latents")
    return CODECS.get(name).example([sampled(shape, 256) if heads is None else heads])


class Filled(NamedTuple):
    """A store of one row, what was put into it, and the maps between."""

    pool: PagePool
    heads: Heads
    codec: Codec
    maps: Transform | None

    def decoded(self):
        """k [tokens, Hkv, Dk], v [tokens, Hkv, Dv] f32 as the pages and the tail hold them."""
        k, v = decoded(self.pool)
        return (k, v) if self.maps is None else (self.maps.k.invert(k), self.maps.v.invert(v))


def filled(name, shape, dtype, tokens=None, rope_raw=None) -> Filled:
    """`tokens` entries: by default two pages and a bit. A calibrated codec has seen just them."""
    layer, preferred = spec(shape), made(name, shape, rope_raw=rope_raw).page_size(None)
    tokens = PAGES * preferred + 5 if tokens is None else tokens
    heads = sampled(shape, tokens, tokens, dtype)
    codec = made(name, shape, heads if tokens else None, rope_raw)
    page_size = codec.page_size(None)
    pool = PagePool(codec.page_format(layer, page_size, dtype), dtype, torch.zeros(1, 1, dtype=torch.int32),
                    torch.zeros((), dtype=torch.int64), RawReader)  # fmt: skip
    maps = codec.request_maps(layer, heads)
    k, v = (heads.k, heads.v) if maps is None else (maps.k.apply(heads.k), maps.v.apply(heads.v))
    pool.reserve(0, -(-tokens // page_size), -(-tokens // page_size))
    if tokens:
        rows, here = torch.zeros(tokens, dtype=torch.int64), torch.ones(tokens, dtype=torch.bool)
        positions = torch.arange(tokens, dtype=torch.int32)
        pool.append(rows, None, here, positions, k, v, one_per_row=False, may_open=True, all_valid=True)
    return Filled(pool, heads, codec, maps)


def decoded(pool):
    """k [tokens, Hkv, r], v [tokens, Hkv, r] f32: the stored numbers."""
    tokens, fmt = int(pool.table.counts.sum()), pool.fmt
    k, v = ops.decode_pages(pool.pages[pool.table.ids[0, 0, :-1].long()], fmt)
    k, v = (x.transpose(1, 2).flatten(0, 1)[:tokens].clone() for x in (k, v))
    if pool.tail is not None and tokens % fmt.group:
        k[tokens - tokens % fmt.group :] = pool.tail[0, :, : tokens % fmt.group].transpose(0, 1).float()
    return k, k[..., : fmt.v_dim] if fmt.latent else v


def rel_error(found, wanted):
    norm = wanted.double().norm()
    return 0.0 if norm == 0 else ((found.double() - wanted.double()).norm() / norm).item()


def test_is_described(name):
    codec = CODECS.get(name)
    assert issubclass(codec, Codec) and codec.name == name
    assert 1 <= made(name, SHAPES[0]).preferred_page_size <= 256
    assert "Bytes per token" in inspect.getdoc(codec)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trip_within_the_declared_error(name, shape, dtype):
    page = filled(name, shape, dtype)
    (k_back, v_back), k = page.decoded(), page.heads.k
    v = k[..., : page.pool.fmt.v_dim] if page.pool.fmt.latent else page.heads.v
    if CODECS.get(name).lossless:
        assert torch.equal(k_back, k.float()) and torch.equal(v_back, v.float())
        return
    declared = page.codec.declared_errors(spec(shape), page.pool.page_size, dtype)
    for back, wanted, most in zip((k_back, v_back), (k, v), declared, strict=True):
        assert 0 < rel_error(back, wanted) <= most, (rel_error(back, wanted), most)
        assert most < 1 or not page.codec.calibrated, "declares nothing"


@pytest.mark.parametrize("tokens", [0, 1, 63, 64, 65, 200])
@pytest.mark.parametrize("queries", [1, 3, 40], ids="T{}".format)
@pytest.mark.parametrize(
    ("shape", "rope_raw", "group"), [*((SHAPES[0], None, group) for group in (1, 4, 8)), (LATENT, None, 5), (LATENT, False, 5)],
    ids=["G1", "G4", "G8", "latent", "rope coded"],
)  # fmt: skip
def test_attend_equals_decode_then_attend(name, shape, rope_raw, group, queries, tokens):
    """decode, prefill_cached and the dense path read what the pages hold, and nothing else; maps are folded as in the cache."""
    heads, k_dim, v_dim, latent = shape
    page = filled(name, shape, torch.float32, tokens, rope_raw)
    pool, maps = page.pool, page.maps
    q = torch.randn(1, queries, heads * group, k_dim, generator=torch.Generator().manual_seed(group))
    if tokens == 0:
        assert pool.num_pages == 0
        return
    k, v = page.decoded()
    want, want_lse = ops.sdpa_lse(q.transpose(1, 2), k.transpose(0, 1)[None], v.transpose(0, 1)[None], scale=0.2)
    none = q.new_zeros(1, queries, heads, k_dim)
    asked, _, _, shift = (q, none, none, None) if maps is None else maps.enter(q, none, none, 0.2)
    positions = torch.full((1, queries), tokens, dtype=torch.int32)
    found = Partial(*pool.reader.attend(asked, pool.view(slice(0, 1)), scale=0.2, q_positions=positions)[:2], True)
    found = found if maps is None else maps.leave(found, shift)
    assert rel_error(found.out, want.transpose(1, 2)) < 2e-4 and (found.lse - want_lse.transpose(1, 2)).abs().max() < 1e-3


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_declared_bytes_are_allocated(name, shape):
    page = filled(name, shape, torch.bfloat16)
    pool, layer, fmt = page.pool, spec(shape), page.pool.fmt
    declared = (PAGES + 1) * fmt.page_size * (fmt.bytes_per_token + 4) + 2 * fmt.tail_elements
    assert pool.nbytes == declared == sum(t.untyped_storage().nbytes() for t in (pool.pages, pool.tail) if t is not None)
    assert page.codec.stored(layer).values_per_token * fmt.traits.bits / 8 <= fmt.bytes_per_token
    if not CODECS.get(name).lossless:
        assert fmt.bytes_per_token < 2 * layer.values_per_token, "a codec that saves nothing"


def test_the_rotary_part_of_a_latent_is_kept(name):
    """Wide unless said otherwise; asked for where there is none, it is refused."""
    if "rope_raw" not in inspect.signature(CODECS.get(name).__init__).parameters:
        return
    wide, coded = (filled(name, LATENT, torch.bfloat16, rope_raw=option) for option in (None, False))
    rotary = slice(LATENT[2], None)
    assert wide.pool.fmt.label.endswith("+rope") and not coded.pool.fmt.label.endswith("+rope")
    assert torch.equal(wide.decoded()[0][..., rotary], wide.heads.k[..., rotary].float())
    assert rel_error(coded.decoded()[0][:-5, :, rotary], coded.heads.k[:-5, :, rotary]) > 1e-3  # the last ones are in the tail
    for shape, what in ((SHAPES[0], "of heads, not a latent"), ((1, 32, 32, True), "a latent without a rotary part")):
        with pytest.raises(ValueError, match=f"rope_raw = true, and the layer stores .*{what}"):
            CODECS.build(name, rope_raw=True).page_format(spec(shape), 64, torch.float32)


def test_widths_that_do_not_fit_are_refused(name):
    if not CODECS.get(name).calibrated:
        return
    codec = CODECS.get(name).example([sampled((2, 64, 64, False), 128)])
    with pytest.raises(ConfigError, match="holds 2 KV heads of width 64 and 64 in layer 0, the model has 2 of 32 and 32"):
        codec.page_format(spec((2, 32, 32, False)), 64, torch.float32)
    with pytest.raises(ConfigError, match="this one has a layer 1"):
        codec.transform(replace(spec((2, 64, 64, False)), layer_idx=1))


def test_not_finite_keys_stay_in_their_entry(name):
    """A NaN in one request's keys reaches no other request, and none that was there before."""
    layer, codec = spec((2, 32, 32, False)), made(name, (2, 32, 32, False))
    page_size = codec.page_size(None)
    fmt, counts = codec.page_format(layer, page_size, torch.float32), torch.zeros(2, 1, dtype=torch.int32)
    pool = PagePool(fmt, torch.float32, counts, torch.zeros((), dtype=torch.int64), RawReader)
    pool.reserve(0, 4, 2)
    rows = torch.arange(2).repeat_interleave(page_size)
    k = torch.randn(2 * page_size, 2, 32)
    k[3] = torch.nan
    k[5] = torch.inf
    here, positions = torch.ones(2 * page_size, dtype=torch.bool), torch.arange(page_size, dtype=torch.int32).repeat(2)
    maps = codec.request_maps(layer, sampled((2, 32, 32, False), page_size))
    k, v = (k, k.clone()) if maps is None else (maps.k.apply(k), maps.v.apply(k))
    pool.append(rows, None, here, positions, k, v, one_per_row=False, may_open=True, all_valid=True)
    out, lse, _ = pool.reader.attend(torch.randn(1, 1, 4, fmt.k_dim), pool.view(slice(1, 2)), scale=0.2)
    assert bool(out.isfinite().all()) and bool(lse.isfinite().all())

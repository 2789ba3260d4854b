"""The page record: layout, allocated bytes, roundtrip error against the declared bound. The table of errors: pytest -s -k table."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pikv_ds.ops.format.formats import FORMATS, PageFormat
from pikv_ds.ops.reference import formats as ref_formats

NAMES = list(FORMATS)
LOSSY = ["int8", "int4", "int2", "fp8_e4m3", "fp4_e2m1"]


def _format(name, k_dim=64, v_dim=None, page_size=None, heads=2, latent=False, **options):
    page_size = page_size or (64 if FORMATS[name].levels else 16)
    return PageFormat(name, heads, k_dim, v_dim or k_dim, page_size, latent, **options)


def _roundtrip(fmt, k, v):
    pages = ref_formats.new_pages(fmt, k.shape[0] + 2)
    ids = torch.arange(1, k.shape[0] + 1).flip(0)
    before = pages.clone()
    ref_formats.encode_pages(pages, fmt, ids, k, v)
    assert torch.equal(pages[0], before[0]) and torch.equal(pages[-1], before[-1])  # no write outside its record
    decoded_k, decoded_v = ref_formats.decode_pages(pages, fmt)
    return decoded_k[ids], decoded_v[ids]


def _error(x, decoded):
    return ((x.double() - decoded.double()).norm() / x.double().norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dim", [8, 32, 64, 96, 128])
def test_roundtrip_within_bound(name, dim):
    generator = torch.Generator().manual_seed(dim)
    fmt = _format(name, dim)
    channel = torch.randn(1, 2, 1, dim, generator=generator) * 5
    k = torch.randn(3, 2, fmt.page_size, dim, generator=generator) + channel
    v = torch.randn(3, 2, fmt.page_size, dim, generator=generator) * 0.3
    decoded_k, decoded_v = _roundtrip(fmt, k, v)
    assert _error(k, decoded_k) <= fmt.k_rel_error
    assert _error(v, decoded_v) <= fmt.v_rel_error


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("k_dim", "v_dim"), [(576, 512), (40, 32)])
def test_latent_has_no_values_of_its_own(name, k_dim, v_dim):
    fmt = _format(name, k_dim, v_dim, heads=1, latent=True)
    k = torch.randn(2, 1, fmt.page_size, k_dim)
    decoded_k, decoded_v = _roundtrip(fmt, k, k[..., :0])
    assert _error(k, decoded_k) <= fmt.k_rel_error
    assert torch.equal(decoded_v, decoded_k[..., :v_dim])
    assert fmt.head.v == fmt.head.v_scale == fmt.head.v_zero == -1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("page_size", [1, 2, 7, 16, 32, 64, 128, 192, 256])
@pytest.mark.parametrize(("k_dim", "v_dim", "latent"), [(32, 32, False), (96, 64, False), (576, 512, True)])
def test_record_bytes_are_what_is_allocated(name, page_size, k_dim, v_dim, latent):
    if FORMATS[name].levels and page_size % 64:
        pytest.skip("refused: test_page_size_must_hold_whole_groups")
    heads = 1 if latent else 3
    fmt = _format(name, k_dim, v_dim, page_size, heads, latent)
    pages = ref_formats.new_pages(fmt, 5)
    assert pages.nbytes == 5 * fmt.record_bytes and pages.data_ptr() % 64 == 0 and fmt.record_bytes % 64 == 0
    # The blocks tile the record: no overlap, 16-byte starts, nothing lost but padding.
    bits = fmt.traits.bits
    used = page_size * heads * (k_dim + (0 if latent else v_dim)) * bits // 8 + 4 * page_size
    if fmt.grouped:
        used += heads * (4 * k_dim * page_size // 64 + (0 if latent else 4 * page_size))
    elif name == "fp4_e2m1":
        used += heads * page_size * (k_dim // 16 + 1 + (0 if latent else v_dim // 16 + 1))
    elif not fmt.raw:
        used += heads * 2 * page_size * (1 if latent else 2)
    assert used <= fmt.record_bytes < used + 64 + 16 * 6 * heads
    starts = [start for start in fmt.head[:-1] if start >= 0]
    assert all(start % 16 == 0 for start in [*starts, fmt.head.end, fmt.positions_offset]) and starts == sorted(starts)
    assert round((fmt.bytes_per_token + 4) * page_size) == fmt.record_bytes


def test_bytes_per_token_of_the_usual_shape():
    """Llama-3-8B's layer, 8 heads of 128: what a slot costs beside its 4-byte position."""
    found = {name: _format(name, 128, page_size=64, heads=8).bytes_per_token for name in NAMES}
    assert found == {"fp32": 8192, "bf16": 4096, "fp16": 4096, "int8": 2048 + 64 + 32, "int4": 1024 + 64 + 32, "fp8_e4m3": 2048 + 32,
                     "int2": 512 + 64 + 32, "fp4_e2m1": 1024 + 128 + 16}  # fmt: skip


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_views_write_through(name):
    fmt = _format(name, 32, page_size=5)
    pages = ref_formats.new_pages(fmt, 3)
    k, v, positions = ref_formats.views(pages, fmt)
    assert k.shape == v.shape == (3, 2, 5, 32) and positions.shape == (3, 5) and bool((positions == -1).all())
    k[1, 1, 4, 31], v[2, 0, 0, 0], positions[2, 4] = 3.0, 5.0, 7
    again = ref_formats.decode_pages(pages, fmt)
    assert again[0].sum() == 3.0 and again[0][1, 1, 4, 31] == 3.0
    assert again[1].sum() == 5.0 and again[1][2, 0, 0, 0] == 5.0
    assert ref_formats.positions(pages, fmt)[2, 4] == 7


@settings(max_examples=60)
@given(
    st.sampled_from([*LOSSY, "fp16", "bf16"]),
    st.integers(0, 2**32),
    st.floats(-4, 4),
    st.floats(-1, 3),
    st.sampled_from(["normal", "outlier", "constant", "two-valued", "one-hot"]),
)
def test_bound_holds_for_any_shape_of_values(name, seed, log_offset, log_scale, kind):
    generator = torch.Generator().manual_seed(seed)
    fmt = _format(name, 32, heads=1)
    x = torch.randn(1, 1, fmt.page_size, 32, generator=generator)
    if kind == "outlier":
        x[..., 3, 5] = 1000.0
    elif kind == "constant":
        x = torch.ones_like(x)
    elif kind == "two-valued":
        x = x.sign()
    elif kind == "one-hot":
        x = torch.nn.functional.one_hot(x.argmax(-1), 32).float()
    x = (x * 10**log_scale + 10**log_offset).clamp(-65000, 65000)
    decoded_k, decoded_v = _roundtrip(fmt, x, x)
    assert _error(x, decoded_k) <= fmt.k_rel_error
    assert _error(x, decoded_v) <= fmt.v_rel_error


@pytest.mark.parametrize("mean", [20, 100])
def test_fp16_scales_beat_bf16_scales(mean):
    """Channels with a large mean, as keys have: why scales and zeros are fp16."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 64, 128, generator=generator) + mean * torch.randn(1, 1, 1, 128, generator=generator)
    low, high = x.amin(-2, keepdim=True), x.amax(-2, keepdim=True)
    error = {}
    for dtype in (torch.float16, torch.bfloat16):
        zero = low.to(dtype).float()
        scale = ((high - zero) / 255).to(dtype).float()
        decoded = ((x - zero) / scale).round().clamp(0, 255) * scale + zero
        error[dtype] = _error(x - x.mean(-2, keepdim=True), decoded - x.mean(-2, keepdim=True))
    print({str(key): f"{value:.2e}" for key, value in error.items()})
    assert error[torch.float16] < (0.95 if mean == 20 else 0.75) * error[torch.bfloat16]


def test_error_table():
    """Usual keys (channel means) and values: what the formats cost in practice, beside the bound."""
    generator = torch.Generator().manual_seed(0)
    for name in NAMES:
        fmt = _format(name, 128, page_size=64)
        k = torch.randn(8, 2, 64, 128, generator=generator) + 2 * torch.randn(1, 2, 1, 128, generator=generator)
        v = torch.randn(8, 2, 64, 128, generator=generator)
        decoded_k, decoded_v = _roundtrip(fmt, k, v)
        errors = _error(k, decoded_k), _error(v, decoded_v)
        bounds = fmt.k_rel_error, fmt.v_rel_error
        print(f"{name:>9} {fmt.bytes_per_token:7.0f} B/token  K {errors[0]:.1e} (< {bounds[0]:.1e})  V {errors[1]:.1e} (< {bounds[1]:.1e})")
        assert errors[0] <= fmt.k_rel_error and errors[1] <= fmt.v_rel_error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("int3", 1, 64, 64, 16), "'int3' is not known; one of: fp32"),
        (("int4", 1, 64, 64, 16), "groups of 64 tokens, and page_size 16 is not a multiple of 64"),
        (("int8", 1, 64, 64, 96), "groups of 64 tokens, and page_size 96 is not a multiple of 64; use page_size 64"),
        (("int4", 1, 64, 63, 64), "v_dim must be a multiple of 8 from 8 to 576, got 63"),
        (("bf16", 1, 100, 64, 64), "k_dim must be a multiple of 8 from 8 to 576, got 100"),
        (("bf16", 1, 64, 640, 64), "v_dim must be a multiple of 8 from 8 to 576, got 640"),
        (("bf16", 1, 64, 64, 257), "page_size must be 1 to 256, got 257"),
        (("bf16", 0, 64, 64, 16), "num_kv_heads must be at least 1, got 0"),
        (("bf16", 2, 576, 512, 16, True), "one head whose value is a part of its key, got 2 heads"),
        (("int8", 1, 64, 64, 32, False, 24), "group must be a multiple of 16 and at least 32 tokens, got 24"),
        (("int4", 1, 64, 64, 72, False, 72), "group must be a multiple of 16 and at least 32 tokens, got 72"),
        (("int8", 1, 64, 64, 64, False, 64, "int5"), "'int5' is not known"),
        (("int8", 1, 64, 32, 64, True, 64, "int4"), "v_name must be 'int8' too, got 'int4'"),
        (("int8", 1, 64, 32, 64, False, 64, None, True), "compressed latent key in fp16; got latent False, k_dim 64, v_dim 32"),
        (("bf16", 1, 64, 32, 64, True, 64, None, True), "compressed latent key in fp16; got latent True"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match="page format") as error:
        PageFormat(*arguments)
    assert message in str(error.value)


def test_pages_of_another_layout_are_refused():
    fmt = _format("bf16")
    with pytest.raises(ValueError, match=rf"uint8 \[num_pages, {fmt.record_bytes}\]"):
        ref_formats.decode_pages(torch.zeros(2, fmt.record_bytes + 64, dtype=torch.uint8), fmt)
    with pytest.raises(ValueError, match="raw format"):
        ref_formats.views(torch.zeros(2, _format("int8").record_bytes, dtype=torch.uint8), _format("int8"))

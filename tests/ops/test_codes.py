"""int2, fp4, mixed formats and raw rope columns against a slow decoder that reads bytes by the words of ops/format/formats.py."""

import itertools
import math
import struct

import pytest
import torch

from pikv_ds.ops.format.formats import FORMATS, PageFormat
from pikv_ds.ops.reference import codes as ref_codes
from pikv_ds.ops.reference import formats as ref_formats

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def e4m3(byte):
    exponent, fraction = byte >> 3 & 15, byte & 7
    size = fraction * 2.0**-9 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7)
    return -size if byte & 0x80 else size


def half(data, at):
    return struct.unpack_from("<e", data, at)[0]


def number(data, fmt, part, head, t, d):
    """Column d of the key or value in slot t."""
    name, dim = (fmt.name, fmt.k_coded) if part == "k" else (fmt.v_name, fmt.v_dim)
    at = {block: head * fmt.head.end + getattr(fmt.head, f"{part}{block}") for block in ("", "_scale", "_zero")}
    bits = FORMATS[name].bits
    row = at[""] + t * dim * bits // 8
    if bits >= 16:
        kind, size = {"fp32": ("<f", 4), "fp16": ("<e", 2), "bf16": ("<H", 2)}[name]
        raw = struct.unpack_from(kind, data, row + size * d)[0]
        return struct.unpack("<f", struct.pack("<I", raw << 16))[0] if name == "bf16" else raw
    code = data[row + d * bits // 8] >> d * bits % 8 & (1 << bits) - 1
    if name == "fp8_e4m3":
        return e4m3(code) * half(data, at["_scale"] + 2 * t)
    if name == "fp4_e2m1":
        scale = e4m3(data[at["_scale"] + t * -(-dim // 16) + d // 16]) * 2.0 ** (data[at["_zero"] + t] - 127)
        return (-1 if code & 8 else 1) * E2M1[code & 7] * scale
    grid = 2 * (t // fmt.group * dim + d if part == "k" else t)
    return code * half(data, at["_scale"] + grid) + half(data, at["_zero"] + grid)


def check_record(fmt, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    k = (torch.randn(1, fmt.num_kv_heads, fmt.page_size, fmt.k_dim, generator=generator) + 1) * scale
    v = torch.randn(1, fmt.num_kv_heads, fmt.page_size, fmt.v_dim, generator=generator) * scale
    pages = ref_formats.new_pages(fmt, 1)
    ref_formats.encode_pages(pages, fmt, torch.tensor([0]), k, v)
    decoded, data = dict(zip("kv", ref_formats.decode_pages(pages, fmt), strict=True)), bytes(pages[0].tolist())
    parts = (("k", fmt.k_coded),) if fmt.latent else (("k", fmt.k_dim), ("v", fmt.v_dim))
    for part, dim in parts:
        for h, t, d in itertools.product(range(fmt.num_kv_heads), (0, 1, fmt.page_size - 1), range(dim)):
            assert decoded[part][0, h, t, d] == torch.tensor(number(data, fmt, part, h, t, d)), (part, h, t, d)
    if fmt.rope_raw:
        assert torch.equal(decoded["k"][..., fmt.v_dim :], k[..., fmt.v_dim :].half().float())
    error = (
        ((decoded["k"] - k).norm() / k.norm()).item(),
        ((decoded["v"] - (k[..., : fmt.v_dim] if fmt.latent else v)).norm() / v.norm()).item(),
    )
    assert error[0] <= fmt.k_rel_error and (fmt.latent or error[1] <= fmt.v_rel_error)


@pytest.mark.parametrize("v_name", list(FORMATS))
@pytest.mark.parametrize("name", list(FORMATS))
def test_every_pair_of_formats(name, v_name):
    fmt = PageFormat(name, 2, 40, 24, 32, group=32, v_name=v_name)
    assert fmt.mixed == (name != v_name) and fmt.grouped == (FORMATS[name].levels > 0)
    assert PageFormat.from_layout(fmt.layout) == fmt
    check_record(fmt, scale=3.0)


@pytest.mark.parametrize("name", ["int8", "int4", "int2", "fp8_e4m3", "fp4_e2m1"])
def test_rope_columns_of_a_latent_stay_wide(name):
    fmt, narrow = (PageFormat(name, 1, 72, 40, 64, latent=True, rope_raw=raw) for raw in (True, False))
    assert PageFormat.from_layout(fmt.layout) == fmt and fmt.k_coded == 40 and fmt.record_bytes > narrow.record_bytes
    assert [narrow.head.rope, narrow.k_coded] == [-1, 72]
    check_record(fmt)


@pytest.mark.parametrize("log_scale", [-30, -8, 0, 12, 60])
def test_fp4_takes_the_nearest_code_at_any_range(log_scale):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, 40, generator=generator) * torch.logspace(-3, 3, 40) * 2.0**log_scale
    code, scale, exponent = ref_codes.encode_fp4(x)
    block = torch.tensor([[e4m3(b) for b in row] for row in scale.tolist()], dtype=torch.float64)
    block = block * torch.exp2(exponent.double() - 127)
    top = torch.nn.functional.pad(x, (0, 8)).unflatten(-1, (3, 16)).abs().amax(-1).double()
    assert ((block - top / 6).abs() <= top / 6 * 2.0**-4 + 2.0**-10 * torch.exp2(exponent.double() - 127)).all()
    values = torch.tensor([*E2M1, *(-e for e in E2M1)], dtype=torch.float64)
    chosen = (values[code.long()] * block.repeat_interleave(16, 1)[:, :40] - x.double()).abs()
    nearest = (values * block.repeat_interleave(16, 1)[:, :40, None] - x.double()[..., None]).abs().amin(-1)
    assert (chosen <= nearest * (1 + 1e-6)).all()
    assert torch.equal(
        ref_codes.decode_fp4(code, scale, exponent.squeeze(-1)).double(), values[code.long()] * block.repeat_interleave(16, 1)[:, :40]
    )


def test_fp4_reaches_its_bound():
    """Elements at 5 steps of a block whose largest is 6 are off by a fifth of themselves: the bound is no guess."""
    x = torch.full((1, 16), 5.0)
    x[0, 0] = 6.0
    code, scale, exponent = ref_codes.encode_fp4(x)
    error = (ref_codes.decode_fp4(code, scale, exponent[..., 0]) - x).norm() / x.norm()
    assert 0.19 < error <= FORMATS["fp4_e2m1"].rounding


def test_fp4_of_numbers_that_are_not():
    x = torch.tensor([[math.nan, 1.5, -3.0] + [0.5] * 13, [math.inf, -math.inf, 1.0] + [0.0] * 13, [0.0] * 16])
    code, scale, exponent = ref_codes.encode_fp4(x)
    found = ref_codes.decode_fp4(code, scale, exponent[..., 0])
    assert (
        found.isfinite().all() and found[0, :3].tolist() == [0.0, 1.5, -3.0] and found[1, 0] == -found[1, 1] > 1e22 and not found[2].any()
    )

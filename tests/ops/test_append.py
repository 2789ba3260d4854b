"""append, migrate, merge: the CPU versions give the bytes of the reference; payloads name their source."""

import itertools

import pytest
import torch

from pikv_ds import ops
from pikv_ds.ops import library
from pikv_ds.ops.build import load
from pikv_ds.ops.format.formats import FORMATS, PageFormat
from pikv_ds.ops.reference import formats as ref_formats
from tests.ops.byte_checks import check_append
from tests.ops.cases import make_case

COMPILED = pytest.mark.parametrize("compiled", ["cpu", "emu"])


def _op(which, name):
    if which == "torch":
        return library.REFERENCE[name]
    if which == "emu":
        load.define_emu()
    return getattr(torch.ops.pikv_emu if which == "emu" else torch.ops.pikv, name)


def _store(fmt, num_pages, rows):
    pages = ref_formats.new_pages(fmt, num_pages)
    extra = {}
    if fmt.grouped:
        extra = {"tail": torch.zeros(rows, fmt.num_kv_heads, fmt.group, fmt.k_dim, dtype=torch.bfloat16)}
    return pages, extra


def _append(which, pages, fmt, k, v, positions, slots, extra, rows):
    args = (pages, extra.get("tail"), k, v, positions, slots, rows if extra else None, *library.layout(fmt))
    _op(which, "append")(*args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("name", "latent"),
    [
        *itertools.product(FORMATS, (False, True)),
        ("int8/int4", False),
        ("fp4_e2m1/int2", False),
        ("int4+rope", True),
        ("fp8_e4m3+rope", True),
    ],
)
@COMPILED
def test_same_bytes_as_the_reference(name, dtype, latent, compiled):
    check_append(name, latent, dtype, lambda op: _op(compiled, op), "cpu")


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e4])
@COMPILED
def test_encoders_agree_at_every_magnitude(name, scale, compiled):
    fmt = PageFormat(name, 1, 64, 64, 64)
    k = torch.randn(64, 1, 64, generator=torch.Generator().manual_seed(1)) * scale
    k[3] = 0
    k[5, 0, ::2] = torch.tensor([448.0, 224.0, 1.0, 17.0]).repeat(8) * scale
    found = {}
    for which in ("torch", compiled):
        pages, extra = _store(fmt, 1, 1)
        rows = torch.zeros(64, dtype=torch.int32)
        _append(which, pages, fmt, k, k, torch.arange(64, dtype=torch.int32), torch.arange(64, dtype=torch.int32), extra, rows)
        found[which] = pages
    different = (found["torch"] != found[compiled]).nonzero()
    assert not different.numel(), f"first difference at byte {different[0].tolist()} of head {fmt.head}"


def test_a_wrong_slot_is_readable():
    """Payload = request, position, head: what is stored must say where it came from."""
    fmt = PageFormat("fp32", 2, 8, 8, 4)
    pages = ops.new_pages(fmt, 6)
    slots = torch.tensor([3, -1, 20, 8, -1, 1], dtype=torch.int32)
    positions = torch.tensor([10, 11, 12, 13, 14, 15], dtype=torch.int32)
    payload = (positions.view(-1, 1, 1) * 10 + torch.arange(2).view(1, 2, 1)).float().expand(6, 2, 8).contiguous()
    ops.append(pages, fmt, payload, -payload, positions, slots)
    k, v, stored = ops.views(pages, fmt)
    for slot, position in zip(slots.tolist(), positions.tolist(), strict=True):
        if slot >= 0:
            page, offset = divmod(slot, 4)
            assert stored[page, offset] == position
            assert k[page, :, offset].eq(torch.tensor([[10.0 * position], [10.0 * position + 1]])).all()
            assert v[page, :, offset].eq(-k[page, :, offset]).all()
    assert int((stored >= 0).sum()) == 4


@pytest.mark.parametrize("which", ["torch", "cpu", "emu"])
def test_migrate_moves_whole_records(which):
    fmt = PageFormat("int4", 2, 32, 32, 64)
    source = torch.randint(0, 256, (5, fmt.record_bytes), dtype=torch.uint8)
    target = torch.zeros(4, fmt.record_bytes, dtype=torch.uint8)
    to, at = torch.tensor([3, -1, 0], dtype=torch.int32), torch.tensor([4, 2, 1], dtype=torch.int32)
    _op(which, "migrate")(target, source, to, at)
    assert torch.equal(target[3], source[4]) and torch.equal(target[0], source[1]) and not target[1:3].any()


@pytest.mark.parametrize("which", ["torch", "cpu"])
@pytest.mark.parametrize("name", list(FORMATS))
def test_pages_sent_to_another_store_are_read_the_same(name, which):
    """Gathered into a buffer, scattered into a store with other page ids, with their bounds: same attention, same scores, to the bit."""
    case = make_case(name, lens=(200, 70), k_dim=32, page_size=64)
    fmt, table, total = case.fmt, case.block_table, case.pages.shape[0]
    bounds = torch.randn(total, fmt.num_kv_heads, 2, fmt.k_dim, generator=torch.Generator().manual_seed(0)).half()
    sent = torch.tensor([n for n in table.flatten().tolist() if n < total], dtype=torch.int32)
    there = torch.randperm(9, generator=torch.Generator().manual_seed(1))[: len(sent)].int()
    moved = {}
    for what, source in (("pages", case.pages), ("bounds", bounds.view(torch.uint8).flatten(1))):
        buffer = torch.empty(len(sent), source.shape[1], dtype=torch.uint8)
        target = torch.full((9, source.shape[1]), 0xFF, dtype=torch.uint8)
        _op(which, "migrate")(buffer, source, torch.arange(len(sent), dtype=torch.int32), sent)
        _op(which, "migrate")(target, buffer, there, torch.arange(len(sent), dtype=torch.int32))
        untouched = [page for page in range(9) if page not in there]
        assert untouched and (target[untouched] == 0xFF).all()
        moved[what] = target
    renamed = dict(zip(sent.tolist(), there.tolist(), strict=True))
    new_table = torch.tensor([renamed.get(n, n) for n in table.flatten().tolist()], dtype=torch.int32).view(table.shape)
    for found, expected in zip(
        ops.decode(case.q, moved["pages"], fmt, new_table, case.seqlens, scale=0.2, **case.extra),
        ops.decode(case.q, case.pages, fmt, table, case.seqlens, scale=0.2, **case.extra),
        strict=True,
    ):
        assert found is expected is None or torch.equal(found, expected)
    new_bounds = moved["bounds"].view(bounds.dtype).view(9, *bounds.shape[1:])
    scores = [ops.page_score(case.q, b, fmt, t, case.seqlens, scale=0.2) for b, t in ((new_bounds, new_table), (bounds, table))]
    assert torch.equal(*scores) and scores[0].isfinite().any()


@COMPILED
def test_merge_is_associative_and_order_free(compiled):
    merge = _op(compiled, "merge")
    generator = torch.Generator().manual_seed(0)
    out, lse = torch.randn(5, 3, 4, 16, generator=generator), torch.randn(5, 3, 4, generator=generator) * 20
    lse[:, 0, 0] = -torch.inf
    lse[1:4] = torch.where(torch.rand(3, 3, 4, generator=generator) < 0.5, -torch.inf, lse[1:4])
    out = torch.where(lse.isinf().unsqueeze(-1), 0.0, out)
    whole = merge(out, lse)
    expected = ops.merge_partials(out.double(), lse.double())
    torch.testing.assert_close(whole[0].double(), expected[0], rtol=1e-6, atol=1e-6)
    order = torch.tensor([3, 1, 4, 0, 2])
    left = merge(out[order[:2]].contiguous(), lse[order[:2]].contiguous())
    right = merge(out[order[2:]].contiguous(), lse[order[2:]].contiguous())
    again = merge(torch.stack([right[0], left[0]]), torch.stack([right[1], left[1]]))
    torch.testing.assert_close(again, whole, rtol=1e-6, atol=1e-6)
    assert whole[1][0, 0] == -torch.inf and not whole[0][0, 0].any()


@pytest.mark.parametrize("num_bytes", [0, 8, 1000, 4096, 3 << 20])
@COMPILED
def test_checksum_of_the_reference_and_compiled_agree(num_bytes, compiled):
    checksum = _op(compiled, "checksum")
    data = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8)
    expected = library.REFERENCE["checksum"](data)
    assert checksum(data) == expected
    if num_bytes:
        data[num_bytes // 2] ^= 4
        assert checksum(data) != expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@COMPILED
def test_a_tail_of_16_bits_saturates(dtype, compiled):
    """fp16 tails of fp32 models: what is beyond 65504 becomes that, as in the codes; NaN stays NaN, in its own token."""
    fmt = PageFormat("int4", 1, 8, 8, 64)
    k = torch.linspace(-1e5, 1e5, 24).view(3, 1, 8)
    k[2, 0, 3] = torch.nan
    found = {}
    for which in ("torch", compiled):
        pages, tail = ref_formats.new_pages(fmt, 1), torch.zeros(1, 1, 64, 8, dtype=dtype)
        _append(which, pages, fmt, k, k, torch.arange(3), torch.arange(3), {"tail": tail}, torch.zeros(3, dtype=torch.int32))
        found[which] = tail[0, 0, :3]
    wanted = k[:, 0].clamp(-65504, 65504).to(dtype) if dtype == torch.float16 else k[:, 0].to(dtype)
    for tail in found.values():
        assert torch.equal(tail.isnan(), wanted.isnan()) and torch.equal(tail.nan_to_num(), wanted.nan_to_num())


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("which", ["torch", "cpu", "emu"])
def test_what_is_not_finite_stays_in_its_entry(name, which):
    """Or, keys of the integer formats, in its group: every other entry has the bits it would have without it."""
    fmt = PageFormat(name, 2, 32, 32, 64)
    clean = torch.randn(128, 2, 32, generator=torch.Generator().manual_seed(0))
    broken = clean.clone()
    broken[70], broken[75, 1, ::3], broken[80, 0, 5] = torch.nan, torch.inf, -torch.inf
    found = []
    for x in (clean, broken):
        pages, extra = _store(fmt, 2, 1)
        slots = torch.arange(128, dtype=torch.int32)
        _append(which, pages, fmt, x, x, slots, slots, extra, torch.zeros(128, dtype=torch.int32))
        found.append([y.transpose(1, 2).flatten(0, 1) for y in ops.decode_pages(pages, fmt)])
    kept = [slot for slot in range(128) if slot not in (70, 75, 80)]
    k_kept = kept[:64] if fmt.grouped else kept
    for part, slots in ((0, k_kept), (1, kept)):
        assert torch.equal(found[0][part][slots], found[1][part][slots]) and found[0][part].isfinite().all()

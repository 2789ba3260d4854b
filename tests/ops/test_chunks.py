"""Long chunks of the query, which the CPU takes as blocked matrix products (attend_chunk.cpp), against f64 on the same stored codes."""

import pytest
import torch

from pikv_ds.ops import library
from pikv_ds.ops.build import load
from pikv_ds.ops.reference import attend as ref_attend
from tests.ops import matrix
from tests.ops.cases import call, compare, compare_lse, make_case

pytestmark = pytest.mark.skipif(load.ensured("cpu") != "cpu", reason="the CPU ops are not served by the compiled library")
KERNELS = [name for name in ("phases", "phases_bf16", "phases_amx") if load.cpu_kernels().get(name)]
OUT, LSE = 2e-5, 1e-5  # below what OUT of the matrix allows: weights have 16 bits, numbers are exact
T = 37  # rows are not a multiple of what the registers hold


def _case(name, lens=(0, 1, 300, 531), *, q_dtype=torch.bfloat16, behind=20, **options):
    """Of `lens` entries each, the case, a chunk of T queries and their positions, `behind` before the end of what is stored."""
    case = make_case(name, lens=lens, **{"heads": 2, "group": 3, "k_dim": 32} | options)
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(len(lens), T, *case.q.shape[1:], generator=generator).to(q_dtype)
    return case, q, (case.q_positions.unsqueeze(1) - behind + torch.arange(T)).int()


def _attend(case, q, asked, window=0, causal=True):
    return ref_attend.attend(
        q.double(), case.pages, case.fmt, case.block_table, case.seqlens, scale=case.fmt.k_dim**-0.5, q_positions=asked, window=window,
        causal=causal, **case.extra,
    )  # fmt: skip


def _check(case, q, asked, kernel, monkeypatch, *, window=0, causal=False, num_splits=0):
    tail = [case.extra.get(name) for name in ("tail", "tail_rows")]
    args = (
        case.pages,
        case.block_table,
        case.seqlens,
        asked,
        *tail,
        *library.layout(case.fmt),
        case.fmt.k_dim**-0.5,
        window,
        causal,
        num_splits,
    )
    out, lse = call("prefill_cached", kernel, monkeypatch, q, *args)
    expected = _attend(case, q, asked, window, causal)
    integers = case.fmt.traits.levels or case.fmt.v_traits.levels  # these stay with the kernels in phases and in tiles
    compare(out, expected[0], matrix.OUT if integers else OUT, "out")
    compare_lse(lse, expected[1], matrix.LSE if integers else LSE, "lse")
    return out, lse


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16", "fp8_e4m3", "fp4_e2m1", "int8", "int4/fp8_e4m3", "bf16/int4"])
class TestChunks:
    @pytest.mark.parametrize(("window", "causal"), [(0, False), (0, True), (45, True), (45, False)])
    def test_what_each_query_sees(self, name, kernel, window, causal, monkeypatch):
        _check(*_case(name, shards=2), kernel, monkeypatch, window=window, causal=causal)

    @pytest.mark.parametrize(("k_dim", "v_dim"), [(128, 128), (40, 48), (96, 64)])
    def test_widths(self, name, kernel, k_dim, v_dim, monkeypatch):
        _check(*_case(name, (70, 300), k_dim=k_dim, v_dim=v_dim), kernel, monkeypatch, causal=True)

    def test_pieces(self, name, kernel, monkeypatch):
        _check(*_case(name, (700, 3)), kernel, monkeypatch, num_splits=3)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["bf16", "fp8_e4m3", "int8", "int8+rope"])
def test_latents(name, kernel, monkeypatch):
    _check(*_case(name, (70, 300), heads=1, group=5, k_dim=576, v_dim=512, latent=True), kernel, monkeypatch, causal=True)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("q_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["fp32", "bf16", "fp8_e4m3"])
def test_types_of_the_query(name, q_dtype, kernel, monkeypatch):
    _check(*_case(name, q_dtype=q_dtype), kernel, monkeypatch, causal=True)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("page_size", [1, 5, 16, 256])
def test_page_sizes(page_size, kernel, monkeypatch):
    _check(*_case("bf16", (1, page_size, page_size + 1, 600), page_size=page_size), kernel, monkeypatch, window=100, causal=True)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["fp32", "bf16", "fp8_e4m3"])
def test_what_is_hidden_from_some_queries_may_be_no_number(name, kernel, monkeypatch):
    """The last entry's value is NaN, and the last queries alone see it."""
    case, q, asked = _case(name, (300,), heads=1)
    expected, _, _ = _attend(case, q, asked)
    page, slot = case.pages[case.block_table[0, 0, 299 // case.fmt.page_size]], 299 % case.fmt.page_size
    at, width = case.fmt.head.v, case.fmt.v_row_bytes
    page[at + slot * width : at + (slot + 1) * width] = 0xFF
    if case.fmt.head.v_scale >= 0:  # e4m3 has no bits of its own for it in every kernel; its scale does
        page[case.fmt.head.v_scale + 2 * slot :][:2] = 0xFF
    tail = [case.extra.get(name) for name in ("tail", "tail_rows")]
    args = (case.pages, case.block_table, case.seqlens, asked, *tail, *library.layout(case.fmt), case.fmt.k_dim**-0.5, 0, True, 0)
    out, _ = call("prefill_cached", kernel, monkeypatch, q, *args)
    sees = asked[0] >= 299
    assert sees.any() and not sees.all()
    assert out[0, sees].isnan().any()
    compare(out[:, ~sees], expected[:, ~sees], OUT, "out")


def test_bits_do_not_depend_on_threads_and_pages(monkeypatch):
    case, q, asked = _case("bf16", (700, 90))
    before = torch.get_num_threads()
    found = _check(case, q, asked, KERNELS[-1], monkeypatch, causal=True)
    try:
        torch.set_num_threads(3)
        assert all(torch.equal(a, b) for a, b in zip(found, _check(case, q, asked, KERNELS[-1], monkeypatch, causal=True), strict=True))
    finally:
        torch.set_num_threads(before)

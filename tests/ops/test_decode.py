"""decode, prefill_cached: every implementation against f64 on the same stored codes. Unused slots, tails and table columns are poisoned."""

import pytest
import torch

from pikv_ds.ops import library
from pikv_ds.ops.format.formats import FORMATS
from pikv_ds.ops.reference import append as ref_append
from tests.ops.cases import IMPLEMENTATIONS, answer, call, compare, compare_lse, make_case, run

PAIRS = ("int8/int4", "int4/int2", "int8/int2", "int8/fp8_e4m3", "fp8_e4m3/int4", "bf16/int4", "fp4_e2m1/int8")
OUT, LSE = 1e-4, 1e-3  # the hi + lo split of q costs int8 about 3e-5; plain paths are below 1e-6


def _check(case, implementation, monkeypatch, out_tolerance=OUT, **options):
    out, lse, page_lse = run(case, implementation, monkeypatch, **options)
    options.pop("num_splits", None)
    expected = answer(case, **options)
    compare(out, expected[0], out_tolerance, f"{implementation} out")
    compare_lse(lse, expected[1], LSE, f"{implementation} lse")
    if options.get("with_page_lse"):
        compare_lse(page_lse, expected[2], LSE, f"{implementation} page lse")
    return out, lse


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", list(FORMATS))
class TestDecode:
    @pytest.mark.parametrize("group", [1, 2, 3, 4, 8, 16])
    def test_groups_and_ragged_lengths(self, name, implementation, group, monkeypatch):
        _check(make_case(name, lens=(0, 1, 64, 65, 130, 17), group=group), implementation, monkeypatch)

    @pytest.mark.parametrize("dim", [8, 32, 40, 96, 128, 192, 576])
    def test_widths(self, name, implementation, dim, monkeypatch):
        _check(make_case(name, lens=(70, 129), k_dim=dim), implementation, monkeypatch)

    @pytest.mark.parametrize("page_size", [1, 5, 16, 32, 64, 128, 256])
    def test_page_sizes(self, name, implementation, page_size, monkeypatch):
        if FORMATS[name].levels and page_size % 64:
            pytest.skip("groups of 64 tokens")
        _check(make_case(name, lens=(1, page_size, page_size + 1, 300), page_size=page_size), implementation, monkeypatch)

    def test_key_and_value_widths_differ(self, name, implementation, monkeypatch):
        _check(make_case(name, lens=(100, 7), k_dim=96, v_dim=64), implementation, monkeypatch)

    @pytest.mark.parametrize("num_heads", [16, 20])
    def test_latent(self, name, implementation, num_heads, monkeypatch):
        _check(make_case(name, lens=(100, 64), heads=1, group=num_heads, k_dim=576, v_dim=512, latent=True), implementation, monkeypatch)

    def test_shards_of_a_request_are_merged(self, name, implementation, monkeypatch):
        _check(make_case(name, lens=(200, 3, 0, 129), shards=3), implementation, monkeypatch)

    @pytest.mark.parametrize("window", [1, 20, 100])
    def test_window_is_tested_on_stored_positions(self, name, implementation, window, monkeypatch):
        _check(make_case(name, lens=(200, 3, 0), shards=2), implementation, monkeypatch, window=window)

    def test_page_lse(self, name, implementation, monkeypatch):
        case = make_case(name, lens=(200, 3, 0, 64), shards=2)
        for window in (0, 50):
            _check(case, implementation, monkeypatch, with_page_lse=True, window=window)

    def test_page_lists_leave_the_rest_alone(self, name, implementation, monkeypatch):
        case = make_case(name, lens=(330, 200, 64), page_size=64)
        page_list = torch.tensor([[[5, 0, -1]], [[-1, 3, 1]], [[-1, -1, -1]]], dtype=torch.int32)
        read = [[5, 0], [3, 1], []]
        for n, columns in enumerate(read):  # pages that are not listed hold NaN
            for c in range(-(-int(case.seqlens[n, 0]) // 64)):
                if c not in columns:
                    case.pages[case.block_table[n, 0, c]] = 0xFF
        _check(case, implementation, monkeypatch, page_list=page_list, with_page_lse=True)

    def test_per_head_tables(self, name, implementation, monkeypatch):
        """Pages of one head each: every head has its own pages and length."""
        case = make_case(name, lens=(100, 64, 3, 70), heads=1, group=3)
        case.block_table, case.seqlens = case.block_table.view(2, 2, -1), case.seqlens.view(2, 2)
        case.q, case.q_positions = case.q.view(2, 6, -1), torch.tensor([100, 100], dtype=torch.int32)
        if case.extra:
            case.extra["tail_rows"] = case.extra["tail_rows"].view(2, 2)
        _check(case, implementation, monkeypatch, with_page_lse=True)

    def test_per_head_lists(self, name, implementation, monkeypatch):
        case = make_case(name, lens=(330, 200), page_size=64)
        page_list = torch.tensor([[[5, 0], [1, 2]], [[-1, 3], [0, 1]]], dtype=torch.int32)
        _check(case, implementation, monkeypatch, page_list=page_list, with_page_lse=True)

    @pytest.mark.parametrize("q_dtype", [torch.float32, torch.float16])
    def test_query_dtype(self, name, implementation, q_dtype, monkeypatch):
        case = make_case(name, lens=(100, 64))
        case.q = torch.randn(case.q.shape, generator=torch.Generator().manual_seed(5)).to(q_dtype)
        _check(case, implementation, monkeypatch)

    @pytest.mark.parametrize("causal", [False, True])
    def test_several_queries(self, name, implementation, causal, monkeypatch):
        case = make_case(name, lens=(150, 20, 0), shards=2, group=2)
        T = 5
        q = torch.randn(3, T, *case.q.shape[1:], generator=torch.Generator().manual_seed(1)).bfloat16()
        asked = (case.q_positions.unsqueeze(1) - T + torch.arange(T)).int()
        for window in (0, 30):
            args = (case.pages, case.block_table, case.seqlens, asked, case.extra.get("tail"), case.extra.get("tail_rows"),
                    *library.layout(case.fmt), case.fmt.k_dim**-0.5, window, causal, 0)  # fmt: skip
            out, lse = call("prefill_cached", implementation, monkeypatch, q, *args)
            for t in range(T):
                single = make_case(name, lens=(150, 20, 0), shards=2, group=2)
                single.q, single.q_positions = q[:, t], asked[:, t]
                expected = answer(single, window=window, causal=causal)
                compare(out[:, t], expected[0], OUT, f"{implementation} query {t}")
                compare_lse(lse[:, t], expected[1], LSE, f"{implementation} query {t}")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", PAIRS)
class TestMixed:
    """Keys of one format, values of another."""

    @pytest.mark.parametrize(("dims", "group"), [((64, 64), 3), ((32, 32), 8), ((128, 128), 1), ((96, 40), 4)])
    def test_widths(self, name, implementation, dims, group, monkeypatch):
        case = make_case(name, lens=(0, 1, 64, 65, 129), k_dim=dims[0], v_dim=dims[1], group=group)
        _check(case, implementation, monkeypatch, with_page_lse=True, window=100 if group == 3 else 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["int8+rope", "int4+rope", "int2+rope", "fp8_e4m3+rope", "fp4_e2m1+rope"])
def test_raw_rope_columns(name, implementation, monkeypatch):
    _check(make_case(name, lens=(100, 64, 1), heads=1, group=5, k_dim=576, v_dim=512, latent=True), implementation, monkeypatch)
    _check(make_case(name, lens=(70,), heads=1, group=2, k_dim=48, v_dim=40, latent=True), implementation, monkeypatch, window=20)


@pytest.mark.parametrize("group", [32, 48])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_smaller_groups(implementation, group, monkeypatch):
    case = make_case("int4", lens=(100, 96, 3, 0), page_size=2 * group, scale_group=group)
    assert case.fmt.group == group
    _check(case, implementation, monkeypatch, with_page_lse=True)


@pytest.mark.parametrize("name", list(FORMATS))
def test_splits_and_page_order_change_nothing(name, monkeypatch):
    case = make_case(name, lens=(1000, 130), page_size=64)
    first = run(case, "vnni", monkeypatch, num_splits=1)
    for num_splits in range(2, 65):
        out, lse, _ = run(case, "vnni", monkeypatch, num_splits=num_splits)
        compare(out, first[0].double(), 1e-5, f"{num_splits} splits")
        compare_lse(lse, first[1].double(), 1e-5, f"{num_splits} splits")
    order = torch.randperm(case.pages.shape[0])
    used = case.block_table < case.pages.shape[0]
    case.pages = case.pages[order]
    case.block_table = torch.where(used, torch.argsort(order)[case.block_table.clamp_max(len(order) - 1)], case.block_table).int()
    moved = run(case, "vnni", monkeypatch, num_splits=1)
    assert torch.equal(moved[0], first[0]) and torch.equal(moved[1], first[1])


def test_int64_tables_give_the_same(monkeypatch):
    case = make_case(lens=(100, 7), shards=2)
    narrow = run(case, "vnni", monkeypatch)
    case.block_table, case.seqlens, case.q_positions = case.block_table.long(), case.seqlens.long(), case.q_positions.long()
    assert torch.equal(run(case, "vnni", monkeypatch)[0], narrow[0])


def test_error_table(monkeypatch):
    """Whole path: K and V as the model gives them, f64 attention over them, against decode on what was stored."""
    for name in FORMATS:
        case = make_case(name, lens=(1024,), k_dim=128, heads=2)
        k, v = case.k.double().transpose(0, 1), case.v.double().transpose(0, 1)
        scores = case.q.double().view(2, 4, -1) @ k.transpose(1, 2) * 128**-0.5
        dense, lse = scores.softmax(-1) @ v, scores.logsumexp(-1)
        out, found_lse, _ = run(case, "vnni", monkeypatch)
        error = ((out.double().view(2, 4, -1) - dense).norm() / dense.norm()).item()
        stored = answer(case)
        kernel = ((out.double() - stored[0]).norm() / stored[0].norm()).item()
        print(f"{name:>9} format + kernel {error:.1e}  kernel {kernel:.1e}  lse {(found_lse.double().view(2, 4) - lse).abs().max():.1e}")
        assert (
            error
            <= {"fp32": 1e-6, "bf16": 1e-5, "fp16": 1e-5, "int8": 0.02, "int4": 0.3, "fp8_e4m3": 0.06, "int2": 1.2, "fp4_e2m1": 0.25}[name]
        )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bf16_error_is_not_larger_than_torch(implementation, monkeypatch):
    case = make_case(lens=(777,), k_dim=128)
    expected = answer(case)[0]
    k, v = (x.transpose(0, 1).unsqueeze(0) for x in (case.k, case.v))
    torch_out = torch.nn.functional.scaled_dot_product_attention(case.q.view(1, 2, 4, -1), k, v).view(expected.shape)
    errors = [((x.double() - expected).norm() / expected.norm()).item() for x in (run(case, implementation, monkeypatch)[0], torch_out)]
    print(f"{implementation}: {errors[0]:.1e}, torch in bf16: {errors[1]:.1e}")
    assert errors[0] <= 1.1 * errors[1]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("latent", [False, True])
def test_the_largest_codes_of_wide_keys(implementation, latent, monkeypatch):
    """Every product of a query and a code at its largest, and of one sign: sums of integers must hold 576 of them."""
    case = make_case("int8", lens=(128,), heads=1, group=1, k_dim=576, v_dim=512 if latent else 576, latent=latent, dtype=torch.float32)
    k = (torch.arange(128) % 2).float().view(128, 1, 1).expand(case.k.shape).contiguous()
    slots = case.block_table[0, 0, :2].repeat_interleave(64) * 64 + torch.arange(64).repeat(2)
    rows = {"tail": case.extra["tail"], "tail_rows": case.extra["tail_rows"].repeat(128)}
    ref_append.append(case.pages, case.fmt, k, case.v, torch.arange(128), slots, **rows)
    case.q = torch.ones_like(case.q) * 0.1
    _check(case, implementation, monkeypatch)


@pytest.mark.parametrize("implementation", ["baseline", "avx2", "avx512", "vnni"])
@pytest.mark.parametrize("name", ["int8+rope", "int4", "fp8_e4m3+rope"])
def test_hidden_groups_of_a_latent_may_hold_anything(name, implementation, monkeypatch):
    """On the CPU a NaN that has left the window reaches no output, neither through scales of its group nor through raw columns."""
    case = make_case(name, lens=(150,), heads=1, group=3, k_dim=40, v_dim=32, latent=True, dtype=torch.float32)
    expected = answer(case, window=60)
    ids, P = case.block_table[0, 0].long(), case.fmt.page_size
    k = torch.full_like(case.k[:64], torch.nan)
    slots = (ids[torch.arange(64) // P] * P + torch.arange(64) % P).int()
    rows = {name: x if name == "tail" else x.repeat(64) for name, x in case.extra.items()}
    tail = None if not rows else rows["tail"].clone()
    ref_append.append(case.pages, case.fmt, k, case.v[:64], torch.arange(64), slots, **rows)
    if tail is not None:
        case.extra["tail"].copy_(tail)
    out, lse, _ = run(case, implementation, monkeypatch, window=60)
    compare(out, expected[0], OUT, implementation)
    compare_lse(lse, expected[1], LSE, implementation)

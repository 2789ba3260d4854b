"""Attention by torch's fused CUDA kernels, without a GPU: the choice between them, what each is handed, what memory a prefill takes.

Which one runs follows from shapes alone. What they are handed is checked twice: by torch's own shape functions on the meta device, and by
stand-ins on the CPU that compute what the kernels promise, in f64, and refuse what the kernels refuse.
"""

import pytest
import torch

from pikv_ds.ops import PageFormat, paged_attention, sdpa_lse
from pikv_ds.ops.reference import fused
from pikv_ds.ops.reference import paged_attention as paged
from pikv_ds.ops.reference.fused import Asked, path_of
from tests.harness.dense import rel_error
from tests.ops.cases import make_case
from tests.ops.live_bytes import LiveBytes

BF16, FP16, F32 = torch.bfloat16, torch.float16, torch.float32
PLAIN = Asked("cuda", (9, 0), BF16, BF16, 128, 128, masked=False)
CHOICES = {
    "no mask": ({}, "flash"),
    "fp16": ({"queries": FP16, "keys": FP16}, "flash"),
    "padded": ({"masked": True}, "efficient"),
    "other widths of keys and values": ({"k_dim": 192}, "efficient"),
    "latents": ({"k_dim": 576, "v_dim": 512, "masked": True}, "efficient"),
    "wide heads": ({"k_dim": 512, "v_dim": 512}, "efficient"),
    "keys of coded pages": ({"keys": F32, "masked": True}, "efficient"),
    "Turing, fp16": ({"capability": (7, 5), "queries": FP16, "keys": FP16}, "efficient"),
    "Turing, bf16": ({"capability": (7, 5)}, "math"),
    "the oracle": ({"queries": F32, "keys": F32}, "math"),
    "f64": ({"queries": torch.float64, "keys": torch.float64}, "math"),
    "scores with a cap": ({"softcap": True}, "math"),
    "two 16-bit dtypes": ({"keys": FP16}, "math"),
    "a width that is not aligned": ({"k_dim": 60, "v_dim": 60}, "math"),
    "no key": ({"empty": True}, "math"),
    "the host": ({"device": "cpu"}, "math"),
}
OPS = {
    "flash": "aten::_scaled_dot_product_flash_attention",
    "window": "aten::_flash_attention_forward",
    "efficient": "aten::_scaled_dot_product_efficient_attention",
}


@pytest.mark.parametrize("what", list(CHOICES))
def test_the_choice(what):
    change, path = CHOICES[what]
    assert path_of(PLAIN._replace(**change)) == path


def visible(Bm: int, T: int, L: int, kind: str) -> torch.Tensor | None:
    """The mask of a case: rows of other lengths (each query of a row sees the same), or a causal one with padding in front."""
    if kind in ("causal", "window", "all"):
        return None
    lens = torch.arange(1, Bm + 1) * L // Bm if kind != "empty row" else torch.tensor([L] * (Bm - 1) + [0])
    row = torch.arange(L)[None, None, None] < lens.view(Bm, 1, 1, 1)
    return row if kind in ("lengths", "empty row") else row & fused.in_order(range(T), L, None, torch.device("cpu"))


CASES = {  # kind: query heads, kv heads, queries, keys, Dk, Dv, dtype of queries, of keys -> op
    "causal": (8, 2, 70, 70, 64, 64, BF16, BF16, "flash"),
    "window": (8, 2, 70, 70, 64, 64, BF16, BF16, "window"),
    "all": (4, 4, 5, 130, 128, 128, FP16, FP16, "flash"),
    "lengths": (8, 2, 33, 130, 64, 64, BF16, BF16, "efficient"),
    "empty row": (8, 2, 33, 130, 64, 64, BF16, F32, "efficient"),
    "padded": (8, 2, 70, 70, 64, 64, BF16, BF16, "efficient"),
    "padded, one head": (4, 4, 70, 70, 40, 24, FP16, FP16, "efficient"),
    "lengths of latents": (16, 1, 9, 130, 576, 512, BF16, BF16, "efficient"),
    "causal, other widths": (8, 2, 70, 70, 192, 128, BF16, BF16, "efficient"),
    "window, other widths": (8, 2, 70, 70, 192, 128, BF16, BF16, "efficient"),
}


def call(kind: str, **options):
    Hq, Hkv, T, L, Dk, Dv, queries, keys, _ = CASES[kind]
    draw, B = torch.Generator().manual_seed(len(kind)), 2
    q = torch.randn(B, T, Hq, Dk, generator=draw).to(queries).transpose(1, 2)  # as models hand them over
    k, v = (torch.randn(B, Hkv, L, D, generator=draw).to(keys) for D in (Dk, Dv))
    name = kind.split(",")[0]
    options |= {"mask": visible(B, T, L, {"lengths of latents": "lengths"}.get(name, name)), "causal": name in ("causal", "window")}
    return (q, k, v), options | ({"window": 20} if name == "window" else {}) | {"scale": Dk**-0.5}


@pytest.mark.parametrize("kind", list(CASES))
def test_torchs_shape_functions_take_the_arguments(kind, monkeypatch):
    (q, k, v), options = call(kind)
    monkeypatch.setattr(fused, "FUSED_ON", ("meta",))
    there = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    with LiveBytes() as seen:
        out, lse = sdpa_lse(*(x.to("meta") for x in (q, k, v)), **there)
    assert out.shape == (*q.shape[:3], v.shape[-1]) and lse.shape == q.shape[:3] and out.dtype == lse.dtype == F32
    assert [name for name in seen.ops if name in OPS.values()] == [OPS[CASES[kind][-1]]]


def _attention(q, k, v, bias, scale, visible=None):
    """What the kernels promise, [B, H, ...] each, in f64."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) * scale + (0 if bias is None else bias.double())
    scores = scores if visible is None else scores.masked_fill(~visible, -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1).float()


@pytest.fixture
def stand_ins(monkeypatch):
    """Of the kernels, for CPU tensors; gives the ops that were called."""
    called, nothing = [], torch.empty(0)

    def needs(*tensors):
        for x in tensors:
            assert x.stride(-1) == 1 and not any(s * x.element_size() % 16 for s in x.stride()[:-1]) and x.data_ptr() % 16 == 0

    def flash(q, k, v, dropout=0.0, causal=False, debug=False, *, scale):
        called.append("flash")
        needs(q, k, v)
        assert q.shape[-1] == k.shape[-1] == v.shape[-1] <= 256 and q.dtype == k.dtype == v.dtype and q.dtype in (BF16, FP16)
        out, lse = _attention(q, k, v, None, scale, fused.in_order(range(q.shape[2]), k.shape[2], None, q.device) if causal else None)
        return out.to(q.dtype), lse, nothing, nothing, q.shape[2], k.shape[2], nothing, nothing, nothing

    def windowed(q, k, v, cum_q, cum_k, max_q, max_k, dropout, causal, debug, *, scale, window_size_left, window_size_right):
        called.append("window")
        assert causal and window_size_right == 0 and (max_q, max_k) == (q.shape[1], k.shape[1])
        seen = fused.in_order(range(max_q), max_k, window_size_left + 1, q.device)
        out, lse = _attention(*(x.transpose(1, 2) for x in (q, k, v)), None, scale, seen)
        return out.transpose(1, 2).to(q.dtype), lse, nothing, nothing, nothing

    def efficient(q, k, v, bias, with_lse, dropout=0.0, causal=False, *, scale):
        called.append("efficient")
        needs(q, k, v)
        assert with_lse and q.shape[1] == k.shape[1] == v.shape[1] and q.dtype == k.dtype == v.dtype
        if bias is not None:
            assert bias.shape == (*q.shape[:3], k.shape[2]) and bias.dtype == q.dtype and not causal and torch.isfinite(bias).all()
            assert bias.stride(-1) == 1 and not any(s * bias.element_size() % 16 for s in bias.stride()[:-1])
        seen = fused.in_order(range(q.shape[2]), k.shape[2], None, q.device) if causal else None
        out, lse = _attention(q, k, v, bias, scale, seen)
        padded = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=torch.nan)
        return out.to(q.dtype), padded, nothing, nothing

    monkeypatch.setattr(fused, "FUSED_ON", ("cpu",))
    library = torch.library.Library("aten", "IMPL")
    for name, call in zip(OPS.values(), (flash, windowed, efficient), strict=True):
        library.impl(name.removeprefix("aten::"), call, "CPU")
    yield called
    library._destroy()


@pytest.mark.parametrize("kind", list(CASES))
def test_what_the_kernels_are_handed_is_the_attention_that_was_asked_for(kind, stand_ins, monkeypatch):
    (q, k, v), options = call(kind)
    out, lse = sdpa_lse(q, k, v, **options)
    assert stand_ins == [CASES[kind][-1]]
    monkeypatch.setattr(fused, "FUSED_ON", ())
    exact, exact_lse = sdpa_lse(q.double(), k.double(), v.double(), **options)
    sees = exact_lse > -torch.inf
    assert torch.equal(lse > -torch.inf, sees) and out[~sees].eq(0).all() and out.dtype == lse.dtype == F32
    assert rel_error(out, exact) <= (1e-6 if k.dtype == F32 else 3e-3)  # the kernel gives its result in the dtype of the keys
    assert (lse[sees] - exact_lse[sees]).abs().max() <= 1e-5


def test_a_bias_is_held_for_some_queries_at_a_time(stand_ins, monkeypatch):
    for kind in ("padded", "window, other widths"):
        (q, k, v), options = call(kind)
        whole = sdpa_lse(q, k, v, **options)
        with monkeypatch.context() as small:
            small.setattr(fused, "_BIAS", 16 * q.shape[0] * k.shape[2])
            stand_ins.clear()
            pieces = sdpa_lse(q, k, v, **options)
        assert len(stand_ins) == -(-q.shape[2] // 16) and all(torch.equal(a, b) for a, b in zip(whole, pieces, strict=True))


def test_a_window_needs_causality():
    (q, k, v), _ = call("causal")
    with pytest.raises(ValueError, match="needs causal=True"):
        sdpa_lse(q, k, v, scale=1.0, window=3)


def test_a_window_in_order_on_the_host():
    (q, k, v), options = call("window")
    _, _, T, _ = q.shape
    mask = fused.in_order(range(T), T, options["window"], q.device)
    for dims in (64, 32):  # the flash path of the CPU, and the plain one
        got = sdpa_lse(q, k, v[..., :dims], **options)
        expected = sdpa_lse(q, k, v[..., :dims], scale=options["scale"], mask=mask)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("name", ["bf16", "int8", "fp8_e4m3"])
def test_pages_read_in_pieces_are_the_pages_read_whole(name, window, monkeypatch):
    case = make_case(name, lens=(200, 0, 65, 64, 129, 1), shards=2)
    size, tables = case.fmt.page_size, case.block_table.shape[0]
    R, T = case.q.shape[0], 7
    q = torch.randn(R, T, *case.q.shape[1:], generator=torch.Generator().manual_seed(1)).bfloat16()
    at = (case.q_positions.unsqueeze(1) + torch.arange(T)).int()
    table = case.block_table.where(case.block_table < case.pages.shape[0], -1)  # the ids of columns without entries may be anything
    args = (q, case.pages, case.fmt, table, case.seqlens)
    options = {"scale": 0.2, "window": window, "q_positions": at, **case.extra}
    whole = paged_attention(*args, **options)
    monkeypatch.setattr(paged, "_WHOLE_ON", ())
    for columns in (1, 2, case.block_table.shape[2]):
        monkeypatch.setattr(paged, "_PIECE", columns * tables * size * case.fmt.num_kv_heads * (case.fmt.k_dim + case.fmt.v_dim) * 4)
        out, lse = paged_attention(*args, **options)
        assert torch.equal(lse == -torch.inf, whole[1] == -torch.inf)
        assert rel_error(out, whole[0]) <= 1e-6 and rel_error(lse.nan_to_num(neginf=0), whole[1].nan_to_num(neginf=0)) <= 1e-6


CONTEXT, CHUNK, HEADS, GROUP, DIM = 32768, 2048, 8, 4, 128


@pytest.mark.parametrize("name", ["bf16", "int8"])
def test_memory_of_a_long_prefill(name, monkeypatch):
    """32k tokens in chunks of 2,048: beside what is stored, at most one layer's raw K and V and 256 MiB. On tensors without memory."""
    found = {context: _prefill_peak(name, context, monkeypatch) for context in (CONTEXT // 2, CONTEXT)}
    raw = CONTEXT * HEADS * 2 * DIM * 2
    print({context: f"{peak / 2**20:.0f} MiB" for context, peak in found.items()}, f"limit {raw / 2**20 + 256:.0f} MiB")
    assert found[CONTEXT] <= raw + (256 << 20)
    assert found[CONTEXT] - found[CONTEXT // 2] <= raw // 2 + (1 << 20), "only what grows copies may depend on the context"


def _prefill_peak(name: str, context: int, monkeypatch) -> int:
    """Largest bytes that were alive beside the pool while a layer took its chunks, the growth of the pool included."""
    from pikv_ds import ops
    from pikv_ds.cache.chunk import finish
    from pikv_ds.pages.pool import PagePool
    from pikv_ds.pages.raw import RawReader
    from pikv_ds.pages.view import PageView
    from pikv_ds.step.query import Partial

    monkeypatch.setattr(fused, "FUSED_ON", ("meta",))
    fmt, meta, size = PageFormat(name, HEADS, DIM, DIM, 64), torch.device("meta"), 64
    counts = torch.zeros(1, 1, dtype=torch.int32, device=meta)
    pool = PagePool(fmt, BF16, counts, torch.zeros((), dtype=torch.int64, device=meta), RawReader)
    worst = 0
    for start in range(0, context, CHUNK):
        used = start // size
        with LiveBytes() as seen:
            q, k, v = (torch.empty(1, CHUNK, heads, DIM, dtype=BF16, device=meta) for heads in (HEADS * GROUP, HEADS, HEADS))
            before = pool.nbytes
            pool.reserve(pool.num_pages - used, CHUNK // size, used + CHUNK // size)
            table = torch.zeros(1, 1, used + 1, dtype=torch.int32, device=meta)
            tail = {} if pool.tail is None else {"tail": pool.tail, "tail_rows": torch.zeros(1, dtype=torch.int32, device=meta)}
            at = torch.zeros(1, CHUNK, dtype=torch.int32, device=meta)
            view = PageView(table, torch.zeros(1, 1, dtype=torch.int32, device=meta), tail.get("tail"), tail.get("tail_rows"))
            read = pool.reader.attend(q, view, scale=0.1, q_positions=at)
            partial = Partial(read.out, read.lse, includes_self=False)
            finish(partial, *(x.transpose(1, 2) for x in (q, k, v)), scale=0.1, window=None, positions=at)
            slots = torch.zeros(CHUNK, dtype=torch.int32, device=meta)
            rows = {} if pool.tail is None else {"tail": pool.tail, "tail_rows": slots}
            ops.append(pool.pages, fmt, k[0], v[0], at[0], slots, **rows)
        worst = max(worst, seen.peak - (pool.nbytes - before if pool.nbytes != before else 0))
    return worst

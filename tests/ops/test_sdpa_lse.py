"""Attention with its log-sum-exp against one query at a time in float64, on the flash path (Dk == Dv) and the plain one."""

import pytest
import torch

from pikv_ds.ops import sdpa_lse
from tests.harness.dense import rel_error
from tests.harness.driver import TOLERANCE
from tests.reference_cache import dense_attention

HEADS = [(4, 4), (8, 2), (8, 1)]
DIMS = [(16, 16), (12, 8), (60, 60)]


def inputs(B: int, Hq: int, Hkv: int, T: int, L: int, dims: tuple[int, int], dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(B + 10 * Hq + 100 * T + L)
    shapes = ((B, Hq, T, dims[0]), (B, Hkv, L, dims[0]), (B, Hkv, L, dims[1]))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def loops(q, k, v, scale, visible):
    """visible [B, T, L] -> out [B, Hq, T, Dv], lse [B, Hq, T] in float64."""
    B, Hq, T, _ = q.shape
    out, lse = torch.zeros(B, Hq, T, v.shape[-1], dtype=torch.float64), torch.zeros(B, Hq, T, dtype=torch.float64)
    for b in range(B):
        for t in range(T):
            seen = visible[b, t]
            out[b, :, t], lse[b, :, t] = dense_attention(q[b, :, t], k[b].transpose(0, 1)[seen], v[b].transpose(0, 1)[seen], scale)
    return out, lse


def assert_close(got, want):
    out, lse = got
    assert out.shape == want[0].shape and lse.shape == want[1].shape
    assert rel_error(out, want[0]) <= TOLERANCE
    empty = want[1] == -torch.inf
    assert torch.equal(lse == -torch.inf, empty) and out[empty].eq(0).all()
    assert rel_error(lse[~empty], want[1][~empty]) <= TOLERANCE


@pytest.mark.parametrize("dims", DIMS, ids=[f"D{k}x{v}" for k, v in DIMS])
@pytest.mark.parametrize(("Hq", "Hkv"), HEADS, ids=[f"H{q}-Hkv{k}" for q, k in HEADS])
@pytest.mark.parametrize("kind", ["none", "causal", "per-row", "per-query", "empty-rows"])
def test_equals_loops(kind, Hq, Hkv, dims):
    B, T, L = 2, 7, 7
    q, k, v = inputs(B, Hq, Hkv, T, L, dims)
    generator = torch.Generator().manual_seed(9)
    visible, mask = torch.ones(B, T, L, dtype=torch.bool), None
    if kind == "causal":
        visible = visible.tril()
    elif kind == "per-row":
        mask = torch.rand(B, 1, 1, L, generator=generator) < 0.6
        visible = mask[:, 0].expand(B, T, L)
    elif kind != "none":
        mask = torch.rand(B, 1, T, L, generator=generator) < 0.4
        if kind == "empty-rows":
            mask[0, 0, 3] = mask[1] = False
        visible = mask[:, 0]
    assert_close(sdpa_lse(q, k, v, scale=0.3, mask=mask, causal=kind == "causal"), loops(q, k, v, 0.3, visible))


@pytest.mark.parametrize(("T", "L"), [(1, 1), (1, 63), (5, 130), (63, 63)], ids=["T1-L1", "T1-L63", "T5-L130", "T63-L63"])
@pytest.mark.parametrize("dims", DIMS[:2], ids=["flash", "plain"])
def test_odd_lengths(dims, T, L):
    q, k, v = inputs(1, 8, 2, T, L, dims)
    assert_close(sdpa_lse(q, k, v, scale=0.25), loops(q, k, v, 0.25, torch.ones(1, T, L, dtype=torch.bool)))


@pytest.mark.parametrize("dims", DIMS[:2], ids=["flash", "plain"])
def test_bf16_is_computed_in_f32(dims):
    q, k, v = inputs(2, 4, 2, 3, 40, dims, torch.bfloat16)
    out, lse = sdpa_lse(q, k, v, scale=0.25)
    assert out.dtype == lse.dtype == torch.float32
    assert_close((out, lse), loops(q, k, v, 0.25, torch.ones(2, 3, 40, dtype=torch.bool)))


@pytest.mark.parametrize("dims", DIMS[:2], ids=["flash", "plain"])
def test_f64_stays_f64(dims):
    q, k, v = inputs(1, 4, 2, 3, 9, dims, torch.float64)
    out, lse = sdpa_lse(q, k, v, scale=0.25)
    want, want_lse = loops(q, k, v, 0.25, torch.ones(1, 3, 9, dtype=torch.bool))
    assert out.dtype == torch.float64 and rel_error(out, want) <= 1e-13 and rel_error(lse, want_lse) <= 1e-13


def test_causal_and_mask_exclude_each_other():
    q, k, v = inputs(1, 2, 2, 3, 3, (4, 4))
    with pytest.raises(ValueError, match="causal and mask exclude each other"):
        sdpa_lse(q, k, v, scale=1.0, mask=torch.ones(1, 1, 3, 3, dtype=torch.bool), causal=True)


@pytest.mark.parametrize("dims", DIMS[:2], ids=["flash", "plain"])
@pytest.mark.parametrize("window", [1, 3, 6, 7, 8])
def test_a_window_ends_where_it_says(window, dims):
    q, k, v = inputs(2, 4, 2, 7, 7, dims)
    visible = torch.ones(7, 7, dtype=torch.bool).tril().triu(1 - window).expand(2, 7, 7)
    assert_close(sdpa_lse(q, k, v, scale=0.3, causal=True, window=window), loops(q, k, v, 0.3, visible))


@pytest.mark.parametrize("dims", DIMS[:2], ids=["alike", "unlike"])
@pytest.mark.parametrize("window", [None, 3])
def test_bounded_scores(window, dims):
    q, k, v = inputs(1, 4, 4, 7, 7, dims)
    visible = torch.ones(7, 7, dtype=torch.bool).tril().triu(1 - (window or 7))
    scores = 2.0 * torch.tanh(0.9 * torch.einsum("bhtd,bhld->bhtl", q.double(), k.double()) / 2.0)
    scores = scores.masked_fill(~visible, -torch.inf)
    want = scores.softmax(-1) @ v.double(), scores.logsumexp(-1)
    assert_close(sdpa_lse(q, k, v, scale=0.9, causal=True, window=window, softcap=2.0), want)

"""Block tables as FlashInfer takes them, against pages read by hand; which cases are its own; and its kernels, where there are any."""

import math
import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pikv_ds import ops
from pikv_ds.ops import library
from pikv_ds.ops.backends import flashinfer
from pikv_ds.ops.backends.csr import page_rows

P = 4


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_rows_name_the_pages_of_the_tables(data):
    tables, heads, columns = (data.draw(st.integers(1, n)) for n in (4, 2, 5))
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    table = torch.randperm(99, generator=draw)[: tables * heads * columns].view(tables, heads, columns).int()
    seqlens = torch.randint(0, columns * P + 1, (tables, heads), generator=draw).int()
    listed = None
    if data.draw(st.booleans()):
        chosen = torch.rand(tables, heads, columns, generator=draw).argsort(-1)[..., : data.draw(st.integers(1, columns))]
        listed = torch.where(torch.rand(chosen.shape, generator=draw) < 0.3, -1, chosen).int()
    rows = page_rows(table, seqlens, P, listed)
    assert rows.indptr.dtype == rows.indices.dtype == rows.last_page_len.dtype == torch.int32
    for m in range(tables * heads):
        n, h = divmod(m, heads)
        asked = range(columns) if listed is None else [c for c in listed[n, h].tolist() if c >= 0]
        entries = {(int(table[n, h, c]), i) for c in asked for i in range(P) if c * P + i < seqlens[n, h]}
        pages = rows.indices[rows.indptr[m] : rows.indptr[m + 1]].tolist()
        last = int(rows.last_page_len[m])
        found = {(page, i) for at, page in enumerate(pages) for i in range(last if at == len(pages) - 1 else P)}
        assert found == entries and len(pages) == len(set(pages))
        assert 0 < last <= P if pages else last == 0


def case(latent: bool = False, heads: int = 1, shards: int = 2):
    """A decode of ragged tables; one is empty, another full."""
    dims = (576, 512) if latent else (64, 64)
    fmt = ops.PageFormat("bf16", 1 if latent or heads > 1 else 2, *dims, 16, latent=latent)
    draw = torch.Generator().manual_seed(3)
    pages = ops.new_pages(fmt, 40)
    k, v, _ = ops.views(pages, fmt)
    k.copy_(torch.randn(k.shape, generator=draw).bfloat16())
    if not latent:
        v.copy_(torch.randn(v.shape, generator=draw).bfloat16())
    table = torch.randperm(40, generator=draw)[: 2 * shards * heads * 5].view(2 * shards, heads, 5).int()
    seqlens = torch.randint(1, 81, (2 * shards, heads), generator=draw).int()
    seqlens[0, 0], seqlens[-1, -1] = 0, 80
    q = torch.randn(2, 4, fmt.k_dim, generator=draw).bfloat16()
    return q, pages, fmt, table, seqlens


class Wrapper:
    """FlashInfer's two wrappers, as their documentation has them, in f64 on the host: plan and run read what they are given as they do."""

    def __init__(self, workspace, layout="HND", use_tensor_cores=False):
        assert layout == "HND" and not workspace.any(), "a workspace of zeros"

    def plan(self, *args, **kwargs):
        if len(args) == 12:  # latents: qo_indptr, kv_indptr, indices, lens, heads, ckv, kpe, page, causal, scale
            _, self.indptr, self.indices, lens, *_, page, causal, self.scale, _, _ = args
            assert not causal
            self.lens = lens
        else:
            self.indptr, self.indices, last, _, _, _, page = args
            self.scale = kwargs["sm_scale"]
            self.lens = (self.indptr.diff() - 1) * page + last
        assert self.indices.numel() == self.indptr[-1] and (self.lens > 0).all()

    def run(self, q, *rest, return_lse):
        if isinstance(rest[0], tuple):
            k, v = rest[0]
        else:
            q = torch.cat([q, rest[0]], -1)
            k, v = torch.cat(rest[1:], -1).unsqueeze(1), rest[1].unsqueeze(1)
        outs, lses = [], []
        for m, length in enumerate(self.lens.tolist()):
            pages = self.indices[self.indptr[m] : self.indptr[m + 1]].long()
            keys, values = (x[pages].transpose(0, 1).flatten(1, 2)[:, :length].double() for x in (k, v))
            scores = torch.einsum("hgd,hld->hgl", q[m].double().unflatten(0, (keys.shape[0], -1)), keys) * self.scale
            outs.append(torch.einsum("hgl,hld->hgd", scores.softmax(-1), values).flatten(0, 1))
            lses.append(scores.logsumexp(-1).flatten() / math.log(2))
        return torch.stack(outs).to(q.dtype), torch.stack(lses).float()


@pytest.mark.parametrize("options", [{}, {"heads": 2}, {"latent": True}, {"shards": 1}])
@pytest.mark.parametrize("some", [False, True])
def test_what_its_kernels_are_given_is_what_decode_reads(options, some, monkeypatch):
    """Without a GPU the kernels are their documentation in f64; rows, strides, shards and the base of the lse are ours to get right."""
    package, mla = types.ModuleType("flashinfer"), types.ModuleType("flashinfer.mla")
    package.BatchDecodeWithPagedKVCacheWrapper = mla.BatchMLAPagedAttentionWrapper = Wrapper
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    monkeypatch.setitem(sys.modules, "flashinfer.mla", mla)
    monkeypatch.setattr(flashinfer, "WORKSPACE", 64)
    q, pages, fmt, table, seqlens = case(**options)
    listed = torch.tensor([4, -1, 0, 2]).expand(*table.shape[:2], 4).int() if some else None
    out, lse = flashinfer.decode(q, pages, fmt, table, seqlens, scale=0.1, page_list=listed)
    expected = ops.decode(q, pages, fmt, table, seqlens, scale=0.1, page_list=listed.contiguous() if some else None)
    torch.testing.assert_close(out, expected[0], rtol=0, atol=2e-2)
    torch.testing.assert_close(lse, expected[1], rtol=0, atol=1e-5)


def test_it_serves_layouts_without_a_kernel_where_it_is_asked_to(monkeypatch):
    """What the CUDA library calls for a layout that it has no kernel for, on tensors of the host."""
    package = types.ModuleType("flashinfer")
    package.BatchDecodeWithPagedKVCacheWrapper = Wrapper
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    monkeypatch.setattr(flashinfer, "WORKSPACE", 64)
    monkeypatch.setattr(library, "_without_kernel", set())
    q, pages, fmt, table, seqlens = case()

    def decode(window: int, block_size: int = 0) -> torch.Tensor:
        asked = torch.full((2,), 90, dtype=torch.int32)
        args = (q, pages, table, seqlens, asked, None, None, None, *fmt.layout, 0.1, window, False, 0, block_size)
        return torch.ops.pikv.decode_reference(*args)[0]

    expected = ops.decode(q, pages, fmt, table, seqlens, scale=0.1)[0]
    monkeypatch.setenv("PIKV_FALLBACK", "flashinfer")
    with pytest.warns(UserWarning, match="runs by flashinfer"):
        found = decode(0)
    assert 0 < (found - expected).abs().max() < 2e-2, "16-bit outputs: it was FlashInfer that ran"
    assert torch.equal(decode(5), ops.decode(q, pages, fmt, table, seqlens, scale=0.1, q_positions=torch.full((2,), 90).int(), window=5)[0])
    assert (decode(0, fmt.page_size // 2) - expected).abs().max() < 1e-5, "it lists whole pages, so the reference ran"
    monkeypatch.setenv("PIKV_FALLBACK", "other")
    with pytest.raises(ValueError, match="'other' is not known"):
        decode(0)


def test_what_is_not_its_own_is_refused_by_name():
    bf16 = torch.bfloat16
    plain = lambda name, k=128, v=128, **more: ops.PageFormat(name, 2, k, v, 64, **more)  # noqa: E731
    assert flashinfer.refusal(plain("bf16"), bf16) is None
    assert flashinfer.refusal(ops.PageFormat("bf16", 1, 576, 512, 64, latent=True), bf16) is None
    for fmt, dtype, options, words in (
        (plain("int8"), bf16, {}, "no kernel for int8"), (plain("bf16", v_name="int4"), bf16, {}, "no kernel for bf16/int4"),
        (plain("fp32"), torch.float32, {}, "no kernel for fp32"), (plain("bf16"), torch.float32, {}, "one type"),
        (plain("bf16", 96, 96), bf16, {}, "equal widths"), (plain("bf16", 128, 64), bf16, {}, "equal widths"),
        (ops.PageFormat("bf16", 1, 80, 64, 64, latent=True), bf16, {}, "576 and 512"),
        (plain("bf16"), bf16, {"window": 9}, "counts columns"), (plain("bf16"), bf16, {"with_page_lse": True}, "returns none"),
    ):  # fmt: skip
        assert words in flashinfer.refusal(fmt, dtype, **options)
    with pytest.raises(ValueError, match="no kernel for int8"):
        flashinfer.decode(torch.zeros(1, 2, 128), torch.zeros(0), plain("int8"), torch.zeros(1, 1, 1), torch.zeros(1, 1), scale=1.0)


@pytest.mark.skipif(not (torch.cuda.is_available() and flashinfer.installed()), reason="needs a GPU and flashinfer")
@pytest.mark.parametrize("options", [{}, {"heads": 2}, {"latent": True}])
def test_its_kernels_decode_what_ours_do(options):
    q, pages, fmt, table, seqlens = (x.cuda() if isinstance(x, torch.Tensor) else x for x in case(**options))
    out, lse = flashinfer.decode(q, pages, fmt, table, seqlens, scale=0.1)
    expected = ops.decode(q, pages, fmt, table, seqlens, scale=0.1)
    torch.testing.assert_close(out, expected[0], rtol=0, atol=2e-2)
    torch.testing.assert_close(lse, expected[1], rtol=0, atol=1e-3)

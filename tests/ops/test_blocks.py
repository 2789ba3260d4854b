"""Blocks inside of pages and staging through the ops of the CPU, and choose_pages. All kernels: python -m tests.ops.run_matrix cpu, those
of CUDA on the host: test_emu_matrix.py."""

import pytest
import torch

from pikv_ds import ops
from pikv_ds.ops import library
from pikv_ds.ops.build import load
from pikv_ds.ops.format.bound_codes import decode_box, encode_box
from tests.long_form import LONG
from tests.ops.grown import Grown, P
from tests.ops.matrix import block_points, cpu_points

pytestmark = pytest.mark.skipif(load.ensured("cpu") != "cpu", reason="the CPU ops are not served by the compiled library")
POINTS = [*block_points(), *cpu_points()]
BEST = [name for name, runs in load.cpu_kernels().items() if runs][-1]


@pytest.mark.parametrize("kernel", ["baseline", BEST])
@pytest.mark.parametrize("op", sorted({point.op for point in POINTS}))
def test_matrix(op, kernel, monkeypatch):
    monkeypatch.setenv("PIKV_KERNEL", kernel)
    for point in POINTS if LONG or kernel == BEST else POINTS[::3]:
        if point.op == op:
            point.check(lambda name: getattr(torch.ops.pikv, name), "cpu")


@pytest.mark.parametrize("name", ["bf16", "int4"])
def test_bounds_hold_the_keys_of_their_block(name):
    """By hand: the smallest and largest key of every 8 tokens as decode reads them, also when a group gets its scale."""
    grown = Grown(name, torch.float32, block_size=8)
    for count in (3, 70, 1, 130):
        grown.step(count, torch.ops.pikv.page_bounds)
        for n in range(2):
            for block, keys in enumerate(grown.keys(n).split(8, 1) if grown.keys(n).shape[1] else ()):
                low, high = grown.bounds[int(grown.table[n, 8 * block // P]) * (P // 8) + block % (P // 8)].unbind(1)
                assert torch.equal(low, keys.amin(1)) and torch.equal(high, keys.amax(1)), f"block {block} of table {n}"


def test_opcheck():
    load.ensure("cpu")
    none = torch.zeros(2, 40, dtype=torch.bool)
    args = (torch.randn(2, 3, 40), none, none.clone(), torch.tensor([3, 9]), 12)
    result = torch.library.opcheck(torch.ops.pikv.choose_pages, args, raise_exception=False)
    assert set(result.values()) == {"SUCCESS"}, result


@pytest.mark.parametrize("name", ["stage", "stage_ahead", "gather_sections", "crc32"])
def test_opcheck_of_staging(name):
    load.ensure("cpu")
    ids, longs = torch.tensor([[[0, 5, 6]]], dtype=torch.int32), torch.full((2, 3), -1)
    staging = (torch.full((2, 4), -1, dtype=torch.int32), longs, torch.zeros_like(longs), longs > 0)
    args = {
        "stage": (ids, torch.tensor([[[0, 1], [2, -1]]], dtype=torch.int32), *staging, 5, 2, 1),
        "stage_ahead": (torch.randn(1, 2, 3), torch.zeros(1, 3, dtype=torch.bool), ids, *staging, 5, 1, 2),
        "gather_sections": (torch.zeros(4, 8, dtype=torch.uint8), [torch.ones(3, 8, dtype=torch.uint8)], torch.arange(3),
                            torch.tensor([[1, 0, 1]]), [0], 2, 4),
        "crc32": (torch.zeros(9, dtype=torch.uint8), torch.tensor([1, 2]), None, 4),
    }  # fmt: skip
    result = torch.library.opcheck(getattr(torch.ops.pikv, name), args[name], raise_exception=False)
    assert set(result.values()) == {"SUCCESS"}, result


@pytest.mark.parametrize("which", ["reference", "cpu"])
def test_staging_refuses_what_it_would_read_or_write_beside(which):
    op = (lambda n: library.REFERENCE[n]) if which == "reference" else (lambda n: getattr(torch.ops.pikv, n))
    ids, longs = torch.tensor([[[0, 5, 60]]], dtype=torch.int32), torch.full((2, 3), -1)
    staging = (torch.full((2, 4), -1, dtype=torch.int32), longs, torch.zeros_like(longs), longs > 0)
    listed = lambda *columns: torch.tensor([[columns, columns]], dtype=torch.int32)  # noqa: E731
    with pytest.raises(RuntimeError, match="block_table names page 60, there are 9"):
        op("stage")(ids, listed(2), *staging, 5, 2, 1)
    with pytest.raises(RuntimeError, match="page_list names column 3 of a block table with 3"):
        op("stage")(ids, listed(3), *staging, 5, 2, 1)
    with pytest.raises(RuntimeError, match=r"page_list must be contiguous int32 \[1, 2, num_listed\]"):
        op("stage")(ids, listed(0)[:, :1].contiguous(), *staging, 5, 2, 1)
    with pytest.raises(RuntimeError, match="block_table names page 60, there are 9"):
        op("stage_ahead")(torch.randn(1, 2, 3), torch.zeros(1, 3, dtype=torch.bool), ids, *staging, 5, 1, 2)
    records = [torch.zeros(3, 8, dtype=torch.uint8)]
    for coming, match in (([4, 0, 0], "far page 4 of 4"), ([0, 2, 0], "slot 2, there are 2"), ([0, 0, 2], "section 2 of 2")):
        with pytest.raises(RuntimeError, match=match):
            op("gather_sections")(torch.zeros(4, 8, dtype=torch.uint8), records, torch.zeros(4).long(), torch.tensor([coming]), [0], 2, 4)
    assert all(torch.equal(x, y) for x, y in zip(staging, (staging[0] * 0 - 1, longs * 0 - 1, longs * 0, longs > 0), strict=True))


@pytest.mark.parametrize("which", ["reference", "cpu"])
def test_what_is_refused(which):
    grown = Grown("int4", torch.int8, block_size=8)
    grown.step(70)
    table, lens, q = grown.table[:1].view(1, 1, -1).int(), torch.tensor([[64]], dtype=torch.int32), torch.zeros(1, 4, 32)
    decode, choose = (library.REFERENCE[n] if which == "reference" else getattr(torch.ops.pikv, n) for n in ("decode", "choose_pages"))
    tail = (grown.extra["tail"], torch.zeros(1, dtype=torch.int32))
    with pytest.raises(RuntimeError, match="block_size must divide the page_size 64 and the group 64, got 12"):
        decode(q, grown.pages, table, lens, None, None, *tail, *grown.fmt.layout, 1.0, 0, False, 0, 12)
    beyond = torch.tensor([[[8 * 6]]], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="page_list names column 6 of a block table with 6"):
        decode(q, grown.pages, table, lens, None, beyond, *tail, *grown.fmt.layout, 1.0, 0, False, 0, 8)
    none = torch.zeros(1, 40, dtype=torch.bool)
    with pytest.raises(RuntimeError, match=r"hidden must be contiguous bool \[1, 40\], got"):
        choose(torch.zeros(1, 2, 40), none[:, :39].contiguous(), none, None, 3)


def test_scores_of_int8_bounds_are_those_of_floats():
    """The hand-written kernel splits the query into bytes: widths that fill registers and that do not, several heads, pages and a rest."""
    generator = torch.Generator().manual_seed(0)
    for dim, group in ((128, 1), (64, 4), (72, 3), (576, 2)):
        fmt = ops.PageFormat("bf16", 2, dim, dim, 16)
        boxes = encode_box(torch.randn(37, 2, 2, dim, generator=generator).sort(2).values)
        q = torch.randn(1, 2 * group, dim, generator=generator)
        table, lens = torch.arange(37, dtype=torch.int32).view(1, 1, -1), torch.tensor([[37 * 16 - 3]], dtype=torch.int32)
        exact = ops.page_score(q, decode_box(boxes).contiguous(), fmt, table, lens, scale=0.1)
        torch.testing.assert_close(ops.page_score(q, boxes, fmt, table, lens, scale=0.1), exact, rtol=2e-6, atol=2e-6)

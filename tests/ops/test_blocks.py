"""Blocks inside of pages through the ops of the CPU, and choose_pages. All kernels: python -m tests.ops.run_matrix cpu, those of CUDA on
the host: test_emu_matrix.py."""

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

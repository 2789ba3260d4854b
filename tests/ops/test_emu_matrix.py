"""The CUDA kernels on the host through the short matrix; the long one: python -m tests.ops.run_matrix emu --long."""

import shutil

import pytest
import torch

from pikv_ds.ops.build import load
from tests.ops.matrix import points

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
POINTS = list(points())


@pytest.fixture(params=[False, True], ids=["forward", "reverse"])
def emu(request):
    load.define_emu()
    load.emu_in_reverse(request.param)
    yield lambda name: getattr(torch.ops.pikv_emu, name)
    load.emu_in_reverse(False)


@pytest.mark.parametrize("op", sorted({point.op for point in POINTS}))
def test_matrix(emu, op):
    failed = {}
    for point in POINTS:
        if point.op == op:
            try:
                point.check(emu, "cpu")
            except (AssertionError, RuntimeError) as error:
                failed[point.id] = str(error)
    assert not failed, "\n".join(f"{point}: {error}" for point, error in failed.items())


def test_the_matrix_is_whole():
    decodes = {point.id for point in POINTS if point.op == "decode"}
    for name, page in (
        ("bf16", 16),
        ("fp16", 16),
        ("fp32", 16),
        ("fp8_e4m3", 16),
        ("fp4_e2m1", 16),
        ("int8", 64),
        ("int4", 64),
        ("int2", 64),
    ):
        wanted = {f"{name}-D64-G{group}-P{page}-S1-{mode}-bfloat16" for group in (1, 4, 8, 16) for mode in ("dense", "list", "window")}
        wanted.add(f"{name}-latent576-G5-P{page}-S1-window-bfloat16")
        assert wanted <= decodes, wanted - decodes

"""The CUDA kernels on the host through the short matrix; the long one: python -m tests.ops.run_matrix emu --long."""

import shutil

import pytest
import torch

from pikv_ds.ops.build import load
from tests.ops.matrix import block_points, points, tensor_points

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
POINTS = list(points())


@pytest.fixture(params=[False, True], ids=["forward", "reverse"])
def emu(request):
    load.define_emu()
    load.emu_in_reverse(request.param)
    yield lambda name: getattr(torch.ops.pikv_emu, name)
    load.emu_in_reverse(False)


def _failures(points, emu):
    failed = {}
    for point in points:
        try:
            point.check(emu, "cpu")
        except (AssertionError, RuntimeError) as error:
            failed[point.id] = str(error)
    return failed


@pytest.mark.parametrize("op", sorted({point.op for point in POINTS}))
def test_matrix(emu, op, monkeypatch):
    """The fp32 tier, which serves everything."""
    monkeypatch.setenv("PIKV_TENSOR_CORES", "0")
    failed = _failures((point for point in POINTS if point.op == op), emu)
    assert not failed, "\n".join(f"{point}: {error}" for point, error in failed.items())


def test_tensor_cores(emu, monkeypatch):
    """The same bounds: Q and P are two 16-bit numbers each."""
    monkeypatch.delenv("PIKV_TENSOR_CORES", raising=False)
    failed = _failures(tensor_points(), emu)
    assert not failed, "\n".join(f"{point}: {error}" for point, error in failed.items())


@pytest.mark.parametrize("tier", ["fp32", "tensor cores"])
def test_blocks(emu, tier, monkeypatch):
    """Of pages, read and not read in turns, tails among them: by both tiers."""
    monkeypatch.setenv("PIKV_TENSOR_CORES", "0" if tier == "fp32" else "1")
    failed = _failures(block_points(), emu)
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

"""The long matrix on a device: kernels compiled by nvcc and by NVRTC against the reference, which runs in f64 on the host."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from pikv_ds.ops.build import load
from pikv_ds.ops.build.compile import ToolMissing
from pikv_ds.ops.nvrtc.compiler import compiler
from tests.gpu.marks import needs_gpu
from tests.ops.matrix import points

pytestmark = needs_gpu
POINTS = list(points(long=True))


@pytest.fixture(scope="module")
def cuda():
    load.load_cuda()
    return lambda name: getattr(torch.ops.pikv, name)


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("op", sorted({point.op for point in POINTS}))
def test_cuda(cuda, op):
    failed = {}
    for point in POINTS:
        if point.op == op:
            try:
                point.check(cuda, "cuda")
            except AssertionError as error:
                failed[point.id] = str(error)
    assert not failed, "\n".join(f"{point}: {error}" for point, error in failed.items())


def test_nvrtc():
    """In a process of its own: there the ops of CUDA tensors are these."""
    try:
        compiler()
    except ToolMissing as missing:
        pytest.skip(str(missing))
    command = [sys.executable, "-m", "tests.ops.run_matrix", "nvrtc"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": os.getcwd()}, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool):
    """No access outside a buffer, no hazard in shared memory, over the short matrix."""
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("compute-sanitizer is not on the path")
    command = ["compute-sanitizer", f"--tool={tool}", "--error-exitcode=9", sys.executable, "-m", "tests.ops.run_matrix", "cuda"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": os.getcwd()}, capture_output=True, text=True, timeout=1400)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]

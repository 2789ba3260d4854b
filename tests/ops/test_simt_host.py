"""The host emulation of CUDA kernels: it computes what a kernel means, and notices the bugs planted in csrc/emu/planted.cpp."""

import ctypes
import shutil
import subprocess

import pytest
import torch

from pikv_ds.ops.build.compile import CSRC

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")

BUGS = ["none", "missing barrier", "short shuffle", "lane outside", "divergent barrier", "divergent shuffle", "two barriers", "trap"]


def compile_planted(path, *flags):
    sources = [str(CSRC / "emu" / name) for name in ("simt_host.cpp", "planted.cpp")]
    done = subprocess.run(
        ["g++", "-O1", "-std=c++17", "-Wall", "-Wextra", "-fPIC", "-shared", *flags, *sources, "-o", str(path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    function = ctypes.CDLL(str(path)).planted_block_sum
    function.restype = ctypes.c_char_p
    return function


@pytest.fixture(scope="module", params=[(), ("-DPK_EMU_UCONTEXT",)], ids=["native", "ucontext"])
def block_sum(request, tmp_path_factory):
    function = compile_planted(tmp_path_factory.mktemp("planted") / "planted.so", *request.param)

    def call(bug, reverse, blocks=2, threads=128):
        x = torch.randn(blocks, threads, generator=torch.Generator().manual_seed(0))
        out = torch.zeros_like(x)
        fault = function(BUGS.index(bug), int(reverse), ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr()), blocks, threads)
        expected = x.double().sum(1, keepdim=True).expand_as(x)
        return fault and fault.decode(), bool(torch.allclose(out.double(), expected, rtol=1e-5, atol=1e-5)), out

    return call


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("threads", [32, 128, 1024])
def test_a_right_kernel_is_right(block_sum, reverse, threads):
    fault, right, _ = block_sum("none", reverse, threads=threads)
    assert fault is None and right


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_a_missing_barrier_reads_nan(block_sum, reverse):
    fault, right, out = block_sum("missing barrier", reverse)
    assert fault is None and not right
    assert out.isnan().any(), "shared memory must not start with something that looks like data"


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_a_short_shuffle_gives_a_wrong_sum(block_sum, reverse):
    fault, right, _ = block_sum("short shuffle", reverse)
    assert fault is None and not right


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize(
    "bug, words",
    [
        ("lane outside", "a shuffle reads a lane outside the warp"),
        ("divergent barrier", "divergent __syncthreads"),
        ("divergent shuffle", "divergent shuffle"),
        ("two barriers", "different __syncthreads"),
        ("trap", "thread 5 at "),
    ],
)
def test_faults_are_named_with_their_line(block_sum, bug, words, reverse):
    fault, _, _ = block_sum(bug, reverse)
    assert fault is not None and words in fault and "planted.cpp:" in fault, fault
    again, right, _ = block_sum("none", reverse)  # a fault leaves nothing behind
    assert again is None and right

"""Tensor cores and asynchronous copies in the host emulation: right where they are, and the bugs of csrc/emu/planted_matrix.cpp noticed."""

import ctypes
import shutil
import subprocess

import pytest
import torch

from pikv_ds.ops.build.compile import CSRC

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")

BUGS = ("none", "wrong fragment", "divergent product", "missing wait", "late wait", "wrong bytes", "no barrier", "odd address")
FAULTS = {
    ("divergent product", False): "exchange at different lines",
    ("divergent product", True): "exchange at different lines",
    ("wrong bytes", True): "a copy that is waited for never comes",
    ("no barrier", True): "an mbarrier that nobody has made",
    ("odd address", False): "not aligned",
}


@pytest.fixture(scope="module", params=[(), ("-DPK_EMU_UCONTEXT",)], ids=["native", "ucontext"])
def library(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("planted") / "planted.so"
    sources = [str(CSRC / "emu" / name) for name in ("simt_host.cpp", "planted_matrix.cpp")]
    flags = ("-O1", "-std=c++17", "-Wall", "-Wextra", "-fPIC", "-shared", *request.param)
    done = subprocess.run(["g++", *flags, *sources, "-o", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = ctypes.CDLL(str(path))
    found.planted_product.restype, found.planted_sum.restype = ctypes.c_char_p, ctypes.c_float
    return found


def product(library, bug: str, barriers: bool, reverse: bool):
    """Fault or None, the result, what it should be."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, 64, generator=generator).bfloat16() for rows in (16, 8))
    c = torch.zeros(16, 8)
    fault = library.planted_product(BUGS.index(bug), int(reverse), int(barriers), *(ctypes.c_void_p(x.data_ptr()) for x in (a, b, c)))
    return fault and fault.decode(), c, a.double() @ b.double().T


def both(values: str):
    return pytest.mark.parametrize(values, [False, True])


@both("reverse")
@both("barriers")
def test_a_right_product_is_right(library, barriers, reverse):
    fault, found, expected = product(library, "none", barriers, reverse)
    assert fault is None
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)


@both("reverse")
@both("barriers")
@pytest.mark.parametrize("bug", ["wrong fragment", "missing wait", "late wait"])
def test_a_wrong_result_is_seen(library, bug, barriers, reverse):
    fault, found, expected = product(library, bug, barriers, reverse)
    assert fault is None
    assert not torch.allclose(found.double(), expected, atol=1e-2)
    if bug == "missing wait":
        assert found.isnan().any(), "what has not been copied must not look like data"


@both("reverse")
@pytest.mark.parametrize("bug, barriers", FAULTS)
def test_faults_are_named_with_their_line(library, bug, barriers, reverse):
    fault, *_ = product(library, bug, barriers, reverse)
    assert fault is not None and FAULTS[bug, barriers] in fault and ".cpp:" in fault, fault
    again, found, expected = product(library, "none", barriers, reverse)  # a fault leaves nothing behind
    assert again is None and torch.allclose(found.double(), expected, atol=2e-5)


def test_sums_are_cut_off(library):
    """What is below 2^-24 of the largest term is lost, and nothing is rounded up: no error is above 17 x 2^-24 of it, and a bit."""

    def total(*terms: float) -> float:
        return library.planted_sum((ctypes.c_double * len(terms))(*terms), len(terms))

    assert total(1.0, 2.0**-25, 2.0**-25) == 1.0, "each is cut off before they are added"
    assert total(1.0, 1.5 * 2.0**-23) == 1 + 2.0**-23 and total(-1.0, -1.5 * 2.0**-23) == -1 - 2.0**-23, "towards zero"
    assert total(2.0**20, -(2.0**20), 2.0**-5) == 0.0, "also where the large ones cancel"
    assert total(0.0, 0.0) == 0.0 and total(float("inf"), 1.0) == float("inf")
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        terms = torch.randn(17, generator=generator).double() * 2.0 ** torch.randint(-20, 20, (17,), generator=generator)
        assert (
            abs(total(*terms.tolist()) - terms.sum().item())
            <= 17 * 2.0**-24 * terms.abs().max().item() + 2.0**-23 * terms.sum().abs().item()
        )

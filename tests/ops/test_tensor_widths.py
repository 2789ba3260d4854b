"""Tensor cores beyond the widths of 64 and 128: wider keys, and latents (MLA), under the emulation; bugs planted in the latter's text."""

import shutil

import pytest

from pikv_ds.ops.format.kernels import KERNEL_FORMATS, decode_tier
from tests.long_form import short_or_long
from tests.ops.cases import make_case
from tests.ops.kernel_text import Fault, check_decode, compile_kernels, through

__all__ = ["through"]  # a fixture
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")

_KERNEL, _PRODUCTS, _TILE = "attend_latent.cuh", "latent_products.cuh", "latent_tile.cuh"
_LAST = "mma_16816<T::type>(o[n + j], p_low"
# The emulation's warps go in step between exchanges, so it can't see that the barrier behind the tile, or behind its last use, is lost.
PLANTED_LATENT = {
    "missing barrier behind the scores": ((_KERNEL, "      __syncthreads();\n      run.add", "      run.add"), "wrong"),
    "values not transposed": ((_PRODUCTS, "ldmatrix4<true>(v, row + 8 * n)", "ldmatrix4<false>(v, row + 8 * n)"), "wrong"),
    "a product that some lanes leave out": ((_PRODUCTS, _LAST, "if (lane != 9) " + _LAST), "lanes of a warp"),
    "O not rescaled": ((_PRODUCTS, "o[n][k] *= shrink[k / 2];", ""), "wrong"),
    "the grid of the first group": ((_TILE, "(long long)(span.t / a.f.group) * T::k_coded", "(long long)0"), "wrong"),
    "half of the keys": ((_PRODUCTS, "k_low, row + 2 * T::tile_words", "k_low, row"), "wrong"),
    "half of the values": ((_PRODUCTS, "v, row + 2 * T::tile_words", "v, row"), "wrong"),
    "hidden tokens not masked": ((_PRODUCTS, "if (t >= span.count || position < sight[row]", "if (t >= span.count || false"), "wrong"),
}  # fmt: skip
_WAIT = "barrier_wait(full + copied % 2, copied / 2 % 2)"
PLANTED_COPIES = {
    "a copy that is not waited for": ((_KERNEL, _WAIT + ", ++copied", "++copied"), "wrong"),
    "a wait for the copy of before": ((_KERNEL, _WAIT, "barrier_wait(full + copied % 2, copied / 2 % 2 ^ 1)"), "wrong"),
    "the tile that is read": ((_KERNEL, "next, tile + copied % 2", "next, tile + (copied + 1) % 2"), "wrong"),
    "fewer bytes than expected": ((_TILE, "(full, span.count", "(full, 16 + span.count"), "never comes"),
    "tokens of before, behind the last": ((_TILE, "to[i] = {0, 0, 0, 0};", ""), "wrong"),
}  # fmt: skip
QUICK_LATENT = ["missing barrier behind the scores", "the grid of the first group", "a copy that is not waited for"]


LATENT = {"heads": 1, "k_dim": 576, "v_dim": 512, "latent": True}


@pytest.mark.parametrize("bug", short_or_long(QUICK_LATENT, [*PLANTED_LATENT, *PLANTED_COPIES]))
def test_planted_bugs_in_latents_are_noticed(bug, through, tmp_path, monkeypatch):
    label = "bf16" if bug in PLANTED_COPIES else "int8+rope"
    planted, words = (PLANTED_LATENT | PLANTED_COPIES)[bug]
    monkeypatch.setenv("PIKV_CUDA_WIDTHS", "576")
    kernels = compile_kernels(tmp_path / "build", planted, code=KERNEL_FORMATS[label], tiers=4)
    noticed = []
    for reverse in (False, True):
        through(kernels, reverse, tensor=True)
        try:
            case = make_case(label, lens=(300, 0, 65, 64), shards=2, group=5, growth=50.0, page_size=128, **LATENT)
            check_decode(case, window=30)
            check_decode(case)
        except Fault as fault:
            noticed.append(str(fault))
        except AssertionError:
            noticed.append("wrong")
    assert any(words in what for what in noticed), noticed


WIDER = {"bf16": (256, 192), "int4": (96, 192), "int8/int2": (96,)}


def _check(kernels, through, shape, **how):
    for reverse in (False, True):
        through(kernels, reverse, tensor=True, **how)
        case = make_case(lens=(200, 0, 65, 64), shards=2, **shape)
        assert decode_tier(case.fmt, case.q.dtype) == "tensor cores"
        check_decode(case, window=30)
        check_decode(case, num_splits=3)


@pytest.mark.parametrize("label", list(WIDER))
def test_widths_that_the_short_form_does_not_build(label, through, tmp_path, monkeypatch):
    """Queries in shared memory, values that are asked for late, lanes that read two bytes or one."""
    monkeypatch.setenv("PIKV_CUDA_WIDTHS", ",".join(map(str, WIDER[label])))
    kernels = compile_kernels(tmp_path / "build", code=KERNEL_FORMATS[label], tiers=2, dims=WIDER[label])
    for dim in WIDER[label]:
        _check(kernels, through, {"name": label, "k_dim": dim, "group": 5})


@pytest.mark.parametrize("label, bulk", [("bf16", True), ("bf16", False), ("int8+rope", True)])
def test_latents(label, bulk, through, tmp_path, monkeypatch):
    """More rows than a block has; tiles by bulk copies and through registers."""
    monkeypatch.setenv("PIKV_CUDA_WIDTHS", "576")
    kernels = compile_kernels(tmp_path / "build", code=KERNEL_FORMATS[label], tiers=4, bulk=bulk)
    _check(kernels, through, {"name": label, "group": 20, **LATENT}, bulk=bulk)

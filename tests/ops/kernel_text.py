"""Single kernels under the host emulation, from the text in csrc/kernels or from that text with a bug planted in it."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from pikv_ds.ops import library
from pikv_ds.ops.build.compile import CSRC
from pikv_ds.ops.build.cuda_build import width_flag
from pikv_ds.ops.nvrtc import ops as nvrtc_ops
from pikv_ds.ops.nvrtc import route as nvrtc_route
from tests.ops.cases import answer, compare, compare_lse

FORMAT = 3  # int8: scales, zeros, tail


def compile_kernels(
    folder: Path,
    planted: tuple[str, str, str] | None = None,
    code: int = FORMAT,
    tiers: int = 3,
    dims: tuple[int, ...] = (64, 128),
    bulk: bool = True,
) -> ctypes.CDLL:
    """csrc/emu/entry.cpp for the format of this code. tiers: as entry.cpp says; dims: widths on tensor cores; bulk: as on sm_90.
    planted: file, text that occurs in it exactly once, what stands there instead."""
    kernels = folder / "kernels"
    shutil.copytree(CSRC / "kernels", kernels)
    if planted is not None:
        name, right, wrong = planted
        text = (kernels / name).read_text()
        assert text.count(right) == 1, f"{name} has {text.count(right)} times {right!r}; choose the text to replace anew"
        (kernels / name).write_text(text.replace(right, wrong))
    flags = ("-O1", "-std=c++17", "-fPIC", "-shared", "-ffp-contract=off", "-fno-strict-aliasing", "-Wall", "-Wno-unknown-pragmas",
             "-Wno-unused", "-Werror", "-DPK_HOST_EMU", f"-DPK_FORMAT={code}", f"-DPK_EMU_TIERS={tiers}",
             width_flag(dims), f"-DPK_EMU_BULK={int(bulk)}",
             *(f"-I{path}" for path in (CSRC / "emu", CSRC / "include", kernels)))  # fmt: skip
    sources = [str(CSRC / "emu" / name) for name in ("simt_host.cpp", "entry.cpp")]
    done = subprocess.run(["g++", *flags, *sources, "-o", str(folder / "kernels.so")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(folder / "kernels.so"))
    library.pikv_emu_launch.restype = ctypes.c_char_p
    library.pikv_emu_launch.argtypes = [ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int]
    library.pikv_sizeof.restype = ctypes.c_size_t
    return library


class Fault(RuntimeError):
    """What the emulation reports."""


def launcher(library: ctypes.CDLL, reverse: bool = False):
    """What stands in for nvrtc_ops.launch."""

    def launch(part, kernel, grid, shared_bytes, params, device):
        fault = library.pikv_emu_launch(kernel.encode(), *grid, shared_bytes, ctypes.addressof(params), int(reverse))
        if fault is not None:
            raise Fault(fault.decode())

    return launch


@pytest.fixture
def through(monkeypatch):
    """Run nvrtc_ops on the host: its launches go to the emulation. tensor: on tensor cores what they serve, else by the fp32 tier."""

    def use(kernels, reverse=False, tensor=False, bulk=True):
        monkeypatch.setenv("PIKV_TENSOR_CORES", str(int(tensor)))
        for module in (nvrtc_ops, nvrtc_route):
            monkeypatch.setattr(module, "launch", launcher(kernels, reverse))
            monkeypatch.setattr(module, "num_processors", lambda device: 2)
        monkeypatch.setattr(nvrtc_ops, "has_bulk_copies", lambda device: bulk)
        monkeypatch.setenv("PIKV_DEBUG", "1")

    return use


def check_decode(case, **options) -> None:
    """ops/nvrtc/ops.py, sent to the emulation by `through`, against f64. Options: window, page_list, num_splits."""
    window, page_list = options.get("window", 0), options.get("page_list")
    args = (
        case.q,
        case.pages,
        case.block_table,
        case.seqlens,
        case.q_positions,
        page_list,
        case.extra.get("tail"),
        case.extra.get("tail_rows"),
    )
    rest = (*library.layout(case.fmt), case.fmt.k_dim**-0.5, window, True, options.get("num_splits", 0))
    out, lse, page_lse = nvrtc_ops.decode(*args, *rest)
    expected = answer(case, with_page_lse=True, window=window, page_list=page_list)
    compare(out, expected[0], 1e-5, "out")
    compare_lse(lse, expected[1], 1e-4, "lse")
    compare_lse(page_lse, expected[2], 1e-4, "page lse")

"""Single kernels under the host emulation, from the text in csrc/kernels or from that text with a bug planted in it."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

from pikv_ds.ops.build.compile import CSRC

FORMAT = 3  # int8: scales, zeros, tail


def compile_kernels(folder: Path, planted: tuple[str, str, str] | None = None, code: int = FORMAT, tiers: int = 3) -> ctypes.CDLL:
    """csrc/emu/entry.cpp for the format of this code. tiers: as entry.cpp says. planted: file, text that
    occurs in it exactly once, what stands there instead."""
    kernels = folder / "kernels"
    shutil.copytree(CSRC / "kernels", kernels)
    if planted is not None:
        name, right, wrong = planted
        text = (kernels / name).read_text()
        assert text.count(right) == 1, f"{name} has {text.count(right)} times {right!r}; choose the text to replace anew"
        (kernels / name).write_text(text.replace(right, wrong))
    flags = ("-O1", "-std=c++17", "-fPIC", "-shared", "-ffp-contract=off", "-fno-strict-aliasing", "-Wall", "-Wno-unknown-pragmas",
             "-Wno-unused", "-Werror", "-DPK_HOST_EMU", f"-DPK_FORMAT={code}", f"-DPK_EMU_TIERS={tiers}",
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

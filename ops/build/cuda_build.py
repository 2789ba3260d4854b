"""The CUDA kernels as libraries: for a GPU by nvcc, and for the host emulation by the C++ compiler, from the same files.

nvcc is called directly: torch's own extension builder refuses to run under a CPU torch, and would ask it for the architectures.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

# Relative: setup.py reads these two folders without the package.
from ..format.kernels import KERNEL_FORMATS, LATENT, LATENT_TENSOR, TENSOR, TENSOR_DIMS, built_dims
from .compile import Library, Source

ARCHITECTURES = ("80", "90")
HEADERS = ("include", "kernels", "cuda", "cpu")
_TORCH_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # torch 2.11 and later


def cuda_library() -> Library:
    """Code of `architectures()`, registered for CUDA tensors. It loads beside a CPU torch and without a driver."""
    torch_root = _torch_root()
    flags = ("-O3", "-std=c++17", "-Xcompiler=-fPIC", "-Xptxas=-v", "-DUSE_CUDA", _TORCH_ABI, f"-I{torch_root / 'include'}",
             *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures()))  # fmt: skip
    flags += _width_flags()
    link = ("-cudart=static", f"-L{torch_root / 'lib'}", f"-Xlinker=-rpath={torch_root / 'lib'}", "-ltorch_cpu", "-lc10")
    return Library("pikv_cuda", nvcc(), flags, _sources(), link, HEADERS, keep_log=True)


def architectures() -> tuple[str, ...]:
    """Those in PIKV_CUDA_ARCH ("80", "90" or "80,90"), by default all. A library runs on the GPUs that it was built for, and only there."""
    given = os.environ.get("PIKV_CUDA_ARCH", ",".join(ARCHITECTURES)).split(",")
    if not given or set(given) - set(ARCHITECTURES):
        raise ValueError(f"PIKV_CUDA_ARCH={','.join(given)!r}: legal are {', '.join(ARCHITECTURES)}, or both with a comma between them")
    return tuple(arch for arch in ARCHITECTURES if arch in given)


def emu_library() -> Library:
    """The same files under csrc/emu, registered for CPU tensors as torch.ops.pikv_emu: for tests, slow."""
    torch_root = _torch_root()
    # Contraction off: __fmul_rn and __fsub_rn round one by one. Aliasing: kernels load bytes as vectors.
    flags = ("-x", "c++", "-O2", "-std=c++17", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-fno-math-errno", "-Wall",
             "-Wno-unknown-pragmas", "-Werror=return-type", "-DPK_HOST_EMU", _TORCH_ABI, f"-I{torch_root / 'include'}",
             *_width_flags())  # fmt: skip
    link = (f"-L{torch_root / 'lib'}", f"-Wl,-rpath,{torch_root / 'lib'}", "-ltorch_cpu", "-lc10")
    return Library("pikv_emu", os.environ.get("CXX", "g++"), flags, (Source("emu/simt_host.cpp"), *_sources()), link, (*HEADERS, "emu"))


def _width_flags() -> tuple[str, ...]:
    """PIKV_CUDA_WIDTHS: tensor-core kernels of some widths only, for a shorter build; what is left out is served by the fp32 tier."""
    dims = built_dims()
    return (() if set(TENSOR_DIMS) <= set(dims) else (width_flag(dims),)) + (() if LATENT in dims else ("-DPK_NO_LATENT",))


def width_flag(dims: tuple[int, ...]) -> str:
    return f"-DPK_TENSOR_WIDTHS={' '.join(f'X({dim})' for dim in dims if dim != LATENT)}"


def nvcc() -> str:
    """The command, from CUDA_HOME or the path; whether it is there is found out when it runs."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc") or ("/usr/local/cuda/bin/nvcc" if Path("/usr/local/cuda/bin/nvcc").is_file() else "nvcc")


def tensor_source(label: str) -> Source:
    """The kernels on tensor cores of a format."""
    return Source("cuda/tensor_kernels.cu", (f"-DPK_FORMAT={KERNEL_FORMATS[label]}",))


def latent_source(label: str) -> Source:
    """The kernel on tensor cores of latents in a format."""
    return Source("cuda/latent_kernels.cu", (f"-DPK_FORMAT={KERNEL_FORMATS[label]}",))


def _sources() -> tuple[Source, ...]:
    kernels = tuple(Source("cuda/attend_kernels.cu", (f"-DPK_FORMAT={code}",)) for code in KERNEL_FORMATS.values())
    kernels += tuple(tensor_source(label) for label in TENSOR)
    if LATENT in built_dims():
        kernels += tuple(latent_source(label) for label in LATENT_TENSOR)
    launchers = (Source(f"cuda/{name}.cu") for name in ("pages", "bounds", "pack", "route", "slots", "attend"))
    return (Source("cuda/page_kernels.cu"), *launchers, *kernels)


def _torch_root() -> Path:
    import torch

    return Path(torch.__file__).parent

"""The CUDA kernels through NVRTC, for a machine with a GPU and no nvcc: needs the packages cupy-cuda13x and nvidia-cuda-nvrtc.

Compiling needs neither a GPU nor a driver, so `pikv build nvrtc` checks it anywhere. The result is machine code of one architecture, not
PTX: a driver older than NVRTC refuses its PTX.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

from pikv_ds.ops.build import ptxas
from pikv_ds.ops.build.compile import CSRC, BuildError, ToolMissing, cache_dir
from pikv_ds.ops.format import kernels
from pikv_ds.ops.format.kernels import KERNEL_FORMATS, LATENT, LATENT_TENSOR, TENSOR, TENSOR_DIMS

_COMMON = ("include/page_format.h", "kernels/params.cuh", "kernels/common.cuh", "kernels/numbers.cuh")
_FP32 = ("work", "tile", "span", "part")  # of kernels/, in this order
TENSOR_FILES = (*_FP32, "tensor", "operands", "tensor_tile", "tensor_queries", "tensor_span", "tensor_tail", "attend_tensor")
LATENT_FILES = (*_FP32, "tensor", "operands", "tensor_tile", "tensor_tail", "bulk", "latent_tile", "latent_products", "attend_latent")
_PAGES = ("finish_kernel", "append_rows_kernel", "append_groups_kernel", "append_tail_kernel", "page_bounds_kernel", "page_score_kernel",
          "merge_kernel",
          "pack_kernel", "unpack_kernel", "route_pack_kernel", "route_unpack_kernel", "route_merge_kernel",
          "migrate_kernel", "assign_slots_kernel", "checksum_kernel")  # fmt: skip


@dataclass(frozen=True)
class Part:
    """What is compiled together: the attention kernels of a format, or all the others."""

    files: tuple[str, ...]
    kernels: tuple[str, ...]


def _attend(label: str) -> Part:
    kinds = (kind for width in kernels.widths(label) for kind in kernels.kinds(label, width))
    names = (f"attend_kernel<{KERNEL_FORMATS[label]}, {', '.join(map(str, kind))}>" for kind in kinds)
    return Part(_files(*_FP32, "attend"), tuple(names))


def tensor_part(label: str, dim: int) -> str:
    """A part of its own for each width: a process that compiles at its first launch needs one."""
    return f"{label} on tensor cores, {dim}"


def _on_tensor_cores() -> dict[str, Part]:
    names_of = {(label, dim): tuple(kernels.tensor_kernels(label, (dim,))) for label in TENSOR for dim in TENSOR_DIMS}
    parts = {tensor_part(*of): Part(_files(*TENSOR_FILES), names) for of, names in names_of.items() if names}
    return parts | {tensor_part(label, LATENT): Part(_files(*LATENT_FILES), (kernels.latent_kernel(label),)) for label in LATENT_TENSOR}


def _files(*names: str) -> tuple[str, ...]:
    return tuple(f"kernels/{name}.cuh" for name in names)


PARTS = {label: _attend(label) for label in KERNEL_FORMATS}
PARTS |= _on_tensor_cores()
PARTS["pages"] = Part(_files("append", "bounds", "work", "merge", "pack", "route", "pages", "slots"), _PAGES)


@dataclass(frozen=True)
class Compiled:
    cubin: bytes
    names: dict[str, str]  # kernel -> its name in the cubin
    log: str


@cache
def compiler() -> ModuleType:
    """CuPy's binding of NVRTC. Raises ToolMissing."""
    try:
        from cupy_backends.cuda.libs import nvrtc
    except ImportError as error:
        message = "the package cupy was not found; install cupy-cuda13x and nvidia-cuda-nvrtc, or nvcc for PIKV_OPS=cuda"
        raise ToolMissing(message) from error
    try:
        nvrtc.getVersion()
    except (RuntimeError, ImportError, OSError) as error:
        first = str(error).splitlines()[0]
        raise ToolMissing(f"CuPy is installed, the NVRTC library was not found ({first}); install nvidia-cuda-nvrtc") from error
    return nvrtc


def version() -> str:
    return "NVRTC {}.{}".format(*compiler().getVersion())


def source(part: str) -> str:
    """One text without includes."""
    texts = (f'#line 1 "{name}"\n{(CSRC / name).read_text()}' for name in (*_COMMON, *PARTS[part].files))
    return "".join(texts).replace("#pragma once\n", "\n")


def compile_part(part: str, arch: str) -> Compiled:
    """Machine code for sm_<arch>. Raises BuildError."""
    nvrtc = compiler()
    program = nvrtc.createProgram(source(part), f"pikv_{part}.cu", (), ())
    try:
        for kernel in PARTS[part].kernels:
            nvrtc.addNameExpression(program, f"pikv::{kernel}")
        options = (f"--gpu-architecture=sm_{arch}", "--std=c++17", "--ptxas-options=-v")
        try:
            nvrtc.compileProgram(program, options)
        except nvrtc.NVRTCError as error:
            raise BuildError(f"NVRTC failed for {part} on sm_{arch}:\n{nvrtc.getProgramLog(program)}") from error
        names = {kernel: nvrtc.getLoweredName(program, f"pikv::{kernel}") for kernel in PARTS[part].kernels}
        return Compiled(nvrtc.getCUBIN(program), names, nvrtc.getProgramLog(program))
    finally:
        nvrtc.destroyProgram(program)


def check(arch: str) -> list[ptxas.KernelUse]:
    """Compile every part; the registers and spills of every kernel."""
    return [use for part in PARTS for use in ptxas.parse(compile_part(part, arch).log)]


def cached_part(part: str, arch: str) -> tuple[Path, dict[str, str]]:
    """The path of the machine code, compiled unless the cache has it, and the names of the kernels in it."""
    key = hashlib.sha256("\0".join((source(part), arch, version())).encode()).hexdigest()[:16]
    target = cache_dir() / f"pikv_nvrtc_{re.sub(r'[^A-Za-z0-9.+]+', '_', part)}_sm{arch}-{key}.cubin"
    names = target.with_suffix(".names")
    if not (target.is_file() and names.is_file()):
        target.parent.mkdir(parents=True, exist_ok=True)
        compiled = compile_part(part, arch)
        lines = "".join(f"{kernel}\t{name}\n" for kernel, name in compiled.names.items())
        for path, content in ((names, lines.encode()), (target, compiled.cubin)):
            temporary = path.with_name(f"{path.name}.{os.getpid()}")
            temporary.write_bytes(content)
            os.replace(temporary, path)
    return target, dict(line.split("\t") for line in names.read_text().splitlines())

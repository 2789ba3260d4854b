"""Which implementation of the ops runs. Nothing happens at import: `ensure` is called by the first op on a device.

PIKV_OPS=torch|cpu|cuda|nvrtc|emu forces one, and then a failure is an error. Unset: the first compiled one of the device that can be
built, else the torch reference. Whatever was passed over is named with its reason, in one warning and by `passed_over`.
"""

from __future__ import annotations

import ctypes
import os
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from pikv_ds.ops import library
from pikv_ds.ops.devices import one_device

from .compile import BuildError, build, cpu_library
from .cuda_build import architectures, cuda_library, emu_library

CHOICES = ("torch", "cpu", "cuda", "nvrtc", "emu")


@dataclass(frozen=True)
class Backend:
    device: str  # type of the tensors it serves
    load: Callable[[], None]  # build if needed, then register; raises BuildError


def load_cpu() -> None:
    torch.ops.load_library(str(build(cpu_library())))


def load_cuda() -> None:
    check_gpus()
    torch.ops.load_library(str(build(cuda_library())))


def check_gpus() -> None:
    """Raises BuildError: a GPU of this machine is none that `cuda` compiles for. Without GPUs there is nothing to check."""
    for index in range(torch.cuda.device_count()):
        check_covered(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index), architectures())


def check_covered(gpu: str, capability: tuple[int, int], built: tuple[str, ...]) -> None:
    """Machine code of sm_XY runs on GPUs of the same X whose Y is not smaller. Raises BuildError, where a launch would only fail."""
    major, minor = capability
    if not any(int(arch[:-1]) == major and int(arch[-1]) <= minor for arch in built):
        raise BuildError(
            f"{gpu} is an sm_{major}{minor}, and the library has code for {', '.join(f'sm_{arch}' for arch in built)} only "
            f"(PIKV_CUDA_ARCH); PIKV_OPS=nvrtc compiles for the GPU that is there"
        )


def load_nvrtc() -> None:
    from pikv_ds.ops.nvrtc import compiler as nvrtc

    nvrtc.compiler()  # says what is missing; kernels are compiled when they are first launched
    for name, op in nvrtc_ops().items():
        library._library.impl(name, op, "CUDA")


def nvrtc_ops() -> dict[str, Callable]:
    """What `load_nvrtc` registers."""
    from pikv_ds.ops.nvrtc import ops

    return {name: one_device(name, library.SCHEMAS[name], op) for name, op in ops.OPS.items()}


def load_emu() -> None:
    """The CUDA kernels on the host, for CPU tensors."""
    define_emu()
    for name in library.SCHEMAS:
        library._library.impl(name, getattr(torch.ops.pikv_emu, name), "CPU")


def define_emu() -> None:
    """torch.ops.pikv_emu: the ops of `pikv` by the emulated kernels, beside whatever serves `pikv`. Builds if needed; raises BuildError."""
    if "pikv_emu" in _namespaces:
        return
    path = _emu()
    _namespaces["pikv_emu"] = torch.library.Library("pikv_emu", "DEF")
    for name, schema in library.SCHEMAS.items():
        _namespaces["pikv_emu"].define(name + schema, tags=(torch.Tag.needs_fixed_stride_order,))
    torch.ops.load_library(str(path))


def emu_in_reverse(reverse: bool) -> None:
    """The order of the emulated threads of a block and of the blocks: a result that depends on it is a race. Builds if needed."""
    ctypes.CDLL(str(_emu())).pikv_emu_in_reverse(int(reverse))


@cache
def _emu() -> Path:
    return build(emu_library())


_namespaces: dict[str, torch.library.Library] = {}  # torch forgets a Library that nobody holds
BACKENDS: dict[str, Backend] = {
    "cpu": Backend("cpu", load_cpu),
    "cuda": Backend("cuda", load_cuda),
    "nvrtc": Backend("cuda", load_nvrtc),
    "emu": Backend("cpu", load_emu),
}
_PREFERRED = {"cpu": ("cpu",), "cuda": ("cuda", "nvrtc")}
_one_loads = threading.RLock()
_loading: set[str] = set()
_loaded: dict[str, str] = {}  # device type -> the implementation that serves it
_passed_over: dict[str, str] = {}  # device type -> what would have been better, and why it does not serve


def ensure(device: str) -> bool:
    """Load the compiled ops for a device type unless that was tried before. True when they have just been loaded.

    Threads that come meanwhile wait: none runs the reference while another loads what will serve.
    """
    if device in _loaded:
        return False
    with _one_loads:
        if device in _loaded or device in _loading:  # by another thread, or by this one: loading may run an op
            return False
        _loading.add(device)
        try:
            return _load(device)
        finally:
            _loading.discard(device)


def _load(device: str) -> bool:
    wanted = os.environ.get("PIKV_OPS")
    if wanted == "torch":
        _loaded[device] = wanted
        return False
    if wanted is not None:
        _force(wanted, device)
        return True
    reasons = []
    for name in _PREFERRED.get(device, ()):
        try:
            BACKENDS[name].load()
        except BuildError as error:
            reasons.append(f"{name}: {error}")
            continue
        _loaded[device] = name
        if reasons:
            _passed_over[device] = "; ".join(reasons)
            warnings.warn(f"pikv: the ops on {device!r} tensors run by {name!r}, not as preferred: {_passed_over[device]}", stacklevel=4)
        return True
    _loaded[device] = "torch"
    _passed_over[device] = "; ".join(reasons) or f"there is no compiled version for {device!r} tensors"
    warnings.warn(f"pikv: the ops run in plain torch, slower: {_passed_over[device]}", stacklevel=4)
    return False


def _force(wanted: str, device: str) -> None:
    if wanted not in CHOICES:
        raise ValueError(f"PIKV_OPS={wanted!r} is not one of {', '.join(CHOICES)}")
    backend = BACKENDS[wanted]
    if backend.device != device:
        raise RuntimeError(
            f"PIKV_OPS={wanted} serves {backend.device!r} tensors, the tensors are on {device!r}; unset it or choose another"
        )
    backend.load()
    _loaded[device] = wanted


def ensured(device: str) -> str:
    """The implementation that serves a device type; loads it if no op has done so yet."""
    ensure(device)
    return _loaded[device]


def candidates(device: str) -> list[str]:
    """Implementations that are tried for a device, in order; the torch reference is always the last. Builds and loads nothing."""
    wanted = os.environ.get("PIKV_OPS")
    names = _PREFERRED.get(device, ()) if wanted is None else (wanted,)
    found = [name for name in names if name in BACKENDS and BACKENDS[name].device == device]
    return [*found, "torch"] if wanted in (None, "torch") else found


def cpu_instruction_set() -> str:
    """Name of the attention kernel that serves CPU tensors, as PIKV_KERNEL or PIKV_CPU have it: one of `cpu_kernels`. Builds the library.

    Layouts that it does not serve are served by the next one before it. Raises: RuntimeError for a name that is none, or can't run here.
    """
    name = _cpu().pikv_cpu_kernel_now()
    if name is None:
        raise RuntimeError(_cpu().pikv_cpu_kernel_refusal().decode())
    return name.decode()


def cpu_kernels(path: str | None = None) -> dict[str, bool]:
    """The attention kernels of the CPU, the slowest first, and whether this processor runs each. path: a library that is there; None
    builds the usual one."""
    found, index, opened = {}, 0, _cpu(path)
    while (name := opened.pikv_cpu_kernel(index)) is not None:
        found[name.decode()] = bool(opened.pikv_cpu_kernel_runs(index))
        index += 1
    return found


def kernel(device: str) -> str:
    """What reads pages on this device type, for ranks to compare: the implementation, and on a CPU its kernel. Loads it."""
    served = ensured(device)
    return f"{served} {cpu_instruction_set()}" if served == "cpu" else served


@cache
def _cpu(path: str | None = None) -> ctypes.CDLL:
    opened = ctypes.CDLL(path or str(build(cpu_library())))
    for name in ("pikv_cpu_kernel_now", "pikv_cpu_kernel", "pikv_cpu_kernel_refusal"):
        getattr(opened, name).restype = ctypes.c_char_p
    opened.pikv_cpu_kernel_runs.restype = ctypes.c_bool
    return opened


def passed_over(device: str) -> str:
    """What was tried before the implementation that serves a device type, and why each could not be had; empty when nothing was."""
    return _passed_over.get(device, "")


def loaded() -> dict[str, str]:
    """Implementation per device type that has been used so far."""
    return dict(_loaded)


library.on_first_use = ensure

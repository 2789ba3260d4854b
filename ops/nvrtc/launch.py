"""Starting a kernel that NVRTC compiled, through CuPy. Not run on a GPU yet."""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from . import compiler as nvrtc

BLOCK = 128
WARPS = BLOCK // 32
DEFAULT_SHARED = 48 << 10  # bytes that every kernel may have; more must be asked for


def launch(part: str, kernel: str, grid: tuple[int, int], shared_bytes: int, params: ctypes.Structure, device: torch.device) -> None:
    """Start a kernel on torch's current stream of `device`."""
    from cupy_backends.cuda.api import driver

    function = _function(part, kernel, device.index or 0, shared_bytes)
    arguments = (ctypes.c_void_p * 1)(ctypes.addressof(params))
    stream = torch.cuda.current_stream(device).cuda_stream
    with torch.cuda.device(device):
        driver.launchKernel(function, *grid, 1, BLOCK, 1, 1, shared_bytes, stream, ctypes.addressof(arguments), 0)


@cache
def _function(part: str, kernel: str, device_index: int, shared_bytes: int) -> int:
    import cupy

    major, minor = torch.cuda.get_device_capability(device_index)
    path, names = nvrtc.cached_part(part, f"{major}{minor}")
    with cupy.cuda.Device(device_index):
        function = cupy.RawModule(path=str(path)).get_function(names[kernel])
        if shared_bytes > DEFAULT_SHARED:
            function.max_dynamic_shared_size_bytes = shared_bytes
        return function.kernel.ptr


def has_bulk_copies(device: torch.device) -> bool:
    """kernels/bulk.cuh, as it is compiled for this device."""
    return torch.cuda.get_device_capability(device)[0] >= 9


def num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count

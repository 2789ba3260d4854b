"""Memory for pages: aligned, and on huge OS pages where the system gives them."""

from __future__ import annotations

import ctypes
import sys

import torch
from torch import Tensor

HUGE = 2 << 20
_MADV_HUGEPAGE = 14  # <linux/mman.h>


def aligned_bytes(nbytes: int, device: torch.device | str | None = None) -> Tensor:
    """Uninitialised uint8 [nbytes] that starts on a 64-byte boundary, as torch's allocators give it.

    On Linux CPUs a buffer of 2 MiB and more asks for huge OS pages: random pages of a large store cost a TLB miss each otherwise
    (26 instead of 32 ns per token in bf16 at 32k tokens, random order). No slack is allocated for it: the ragged ends stay ordinary.
    """
    device = torch.device(device or "cpu")
    flat = torch.empty(nbytes, dtype=torch.uint8, device=device)
    if device.type == "cpu" and sys.platform == "linux":
        first = -(-flat.data_ptr() // HUGE) * HUGE
        length = (flat.data_ptr() + nbytes) // HUGE * HUGE - first
        if length > 0:
            # Advice only: a system without huge pages answers with an error that changes nothing.
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), _MADV_HUGEPAGE)
    return flat

"""Memory for pages: aligned, and on huge OS pages where the system gives them."""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path

import torch
from torch import Tensor

HUGE = 2 << 20
_MADV_HUGEPAGE = 14  # <linux/mman.h>
_THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_RANGE = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) ")  # of a mapping in /proc/self/smaps


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


def huge_pages(nbytes: int = 4 * HUGE) -> str:
    """Whether memory for pages gets huge OS pages here, in words: takes `nbytes` as a store would, writes to them and asks the system."""
    if sys.platform != "linux":
        return "not asked for on this system"
    setting = _THP.read_text().strip() if _THP.is_file() else "no transparent huge pages in this kernel"
    flat = aligned_bytes(nbytes).fill_(1)
    first, last = flat.data_ptr(), flat.data_ptr() + nbytes
    huge, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if (found := _RANGE.match(line)) is not None:
            inside = int(found[1], 16) < last and int(found[2], 16) > first
        elif inside and line.startswith("AnonHugePages:"):
            huge += int(line.split()[1]) << 10
    got = min(huge, nbytes)
    return f"{'yes' if got >= nbytes // 2 else 'no'}: {got >> 20} of {nbytes >> 20} MiB asked for; the system says {setting}"

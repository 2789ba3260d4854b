"""Buffers in shared memory that DeepSpeed's collectives on CPU leave behind: 69 MB a rank, after a normal end too.

Their names say whose they are: deepspeed_allreduce_buffer_{user}_{MASTER_ADDR}_{MASTER_PORT}_{rank} (DeepSpeed's shm.cpp). A launcher knows
the address and the port of its job. Ranks with a PiKV engine have taken the names away before (adapters/deepspeed/shm.py).
"""

from __future__ import annotations

import os
from pathlib import Path

FOLDER, PREFIX = Path("/dev/shm"), "deepspeed_allreduce_buffer"


def remove_buffers(port: int | str, address: str = "127.0.0.1") -> list[Path]:
    """Remove those of this user's job at that address and port, which has ended; what a process still has mapped stays. Returns them."""
    removed = []
    for path in FOLDER.glob(f"{PREFIX}_{os.getuid()}_{address}_{port}_*"):
        if not _is_mapped(path):
            path.unlink(missing_ok=True)
            removed.append(path)
    return removed


def _is_mapped(path: Path) -> bool:
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            mapped = maps.read_text(errors="replace")
        except OSError:  # the process has ended, or is another user's
            continue
        if f"{path}\n" in mapped:
            return True
    return False

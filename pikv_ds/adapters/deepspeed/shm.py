"""The buffers in shared memory of DeepSpeed's collectives on CPU, 69 MB a rank, which DeepSpeed never removes.

Every rank maps the buffers of all ranks by name when torch.distributed starts, once in a process. After that the names have no use: without
them the system frees the memory with the last process, however it ends.
"""

from __future__ import annotations

from pathlib import Path

_NAME = "/dev/shm/deepspeed_allreduce_buffer_"


def unlink_own_buffers() -> list[str]:
    """Remove the names of the buffers that this process has mapped, which are those of its job; the memory stays. Returns them.

    Call it when all ranks have started DeepSpeed's communication: after a collective over all of them.
    """
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return []
    names = {line.split(maxsplit=5)[5] for line in maps.read_text().splitlines() if _NAME in line and not line.endswith(" (deleted)")}
    for name in names:
        Path(name).unlink(missing_ok=True)  # another rank of the job may have been first
    return sorted(names)

"""The buffers in shared memory of DeepSpeed's collectives on CPU, 69 MB a rank, which DeepSpeed never removes.

Every rank maps the buffers of all ranks by name when torch.distributed starts, once in a process. After that the names have no use: without
them the system frees the memory with the last process, however it ends.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

_NAME = "/dev/shm/deepspeed_allreduce_buffer_"
_host: list[Callable] = []
"""TorchBackend.__init__ of DeepSpeed, while ours stands in its place."""


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


def unlink_once_mapped() -> bool:
    """From now on DeepSpeed's communication, once it has started on all ranks, has no names of buffers: a rank that is killed leaves none.

    For a launcher, whose script may never make an engine of ours. DeepSpeed has no hook there: its TorchBackend.__init__ is replaced, and
    ends with a barrier where it has made buffers. Returns: False, and changes nothing, when it is so already.
    """
    from deepspeed.comm.torch import TorchBackend

    if _host:
        return False
    host = TorchBackend.__init__

    @functools.wraps(host)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        host(self, *args, **kwargs)
        if getattr(self, "shm_comm_op", None) is not None and dist.is_initialized():
            dist.barrier()  # each rank has mapped those of all
            unlink_own_buffers()

    _host.append(host)
    TorchBackend.__init__ = __init__
    return True


def leave_names() -> bool:
    """Undo unlink_once_mapped(). Returns: False where there was nothing to undo."""
    from deepspeed.comm.torch import TorchBackend

    if not _host:
        return False
    TorchBackend.__init__ = _host.pop()
    return True

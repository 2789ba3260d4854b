"""How long a collective may take. Gloo only: NCCL's own watchdog bounds its collectives on the device without blocking the host."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

LAST_WORDS_S = 10.0  # longest wait for the other ranks' last frame


class Deadline:
    """Waits for collectives of one group.

    A collective that nobody answers keeps a thread of gloo's until the group's own timeout, half an hour by default, and a process that
    ends waits for that thread. So each is started with a deadline of its own, a little after the one at which the wait ends: when it
    passes, gloo closes the connections of the group, and ranks that still wait on it hear of it at once.
    """

    def __init__(self, group: dist.ProcessGroup | None, timeout_s: float) -> None:
        gloo = _gloo_of(group)
        self.timed, self.timed_on_host = gloo is not None and dist.get_backend(group) == "gloo", gloo is not None
        """Its collectives; those of tensors of the host alone, where the group has another backend for a device."""
        last_words_s = min(timeout_s / 2, LAST_WORDS_S)
        self._wait, self._own = timedelta(seconds=timeout_s), timedelta(seconds=timeout_s + last_words_s)
        self._last_words = timedelta(seconds=last_words_s)
        self._backend: Any = gloo

    def bounds(self, device: torch.device) -> bool:
        """Whether a collective of tensors there has a deadline."""
        return self.timed or (self.timed_on_host and device.type == "cpu")

    def wait(self, start: Callable[[], dist.Work], device: torch.device) -> None:
        """For a collective of tensors on `device`. Raises: RuntimeError when it failed or took too long."""
        if not self.bounds(device):
            start().wait()
        else:
            self._started(start, self._own).wait(self._wait)

    def wait_briefly(self, start: Callable[[], dist.Work]) -> None:
        """For a last frame. When it is not answered the connections of the group are closed."""
        self._started(start, self._last_words).wait(self._last_words + timedelta(seconds=1))

    def _started(self, start: Callable[[], dist.Work], deadline: timedelta) -> dist.Work:
        of_group = self._backend.options._timeout  # torch offers no deadline for a single collective
        self._backend._set_default_timeout(deadline)
        try:
            return start()
        finally:
            self._backend._set_default_timeout(of_group)


def _gloo_of(group: dist.ProcessGroup | None) -> Any:
    """The backend that serves tensors of the host, if that is gloo: alone, or beside one for a device ("cpu:gloo,cuda:nccl")."""
    host = torch.device("cpu")
    if group is None or host not in group._device_types:
        return None
    backend = group._get_backend(host)
    return backend if backend.name() == "gloo" else None

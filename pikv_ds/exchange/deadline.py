"""How long a collective may take: gloo's by their own deadline, those of a device that the host reads by asking whether they have ended.

A collective of a device that nobody on the host waits for (NCCL's, in layers after the first) only makes the device wait. There the group's
own timeout holds, and NCCL's watchdog ends the process; but a rank that is lost in the middle of a forward is missed at the next header.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

LAST_WORDS_S = 10.0  # longest wait for the other ranks' last frame
EAGER_S, PAUSE_S = 2e-3, 2e-4  # a collective of a device is asked for without a pause at first, then with one between two questions


def group_timeout(timeout_s: float) -> timedelta:
    """Of a group whose waits end after timeout_s: a little more, so that backends and their watchdogs give up after the host has."""
    return timedelta(seconds=timeout_s + min(timeout_s / 2, LAST_WORDS_S))


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
        self._wait, self._own = timedelta(seconds=timeout_s), group_timeout(timeout_s)
        self._last_words = self._own - self._wait
        self._backend: Any = gloo
        self._group = group

    def bounds(self, device: torch.device, *, read: bool = False) -> bool:
        """Whether a collective of tensors there has a deadline. read: the host waits for what it brings in any case."""
        return read or self.timed or (self.timed_on_host and device.type == "cpu")

    def wait(self, start: Callable[[], dist.Work], device: torch.device, *, read: bool = False) -> None:
        """For a collective of tensors on `device`. Raises: RuntimeError when it failed or took too long."""
        if self.bounds(device):
            self._started(start, self._own).wait(self._wait)
        elif read:
            self.wait_asking(start(), device)
        else:
            start().wait()

    def wait_asking(self, work: dist.Work, device: torch.device) -> None:
        """Until the device has done it, as the host waits for nothing else: NCCL's `wait` would return at once, and the read that follows
        would wait without an end. Raises: RuntimeError when it failed or took too long; its communicator is closed then."""
        begun = time.monotonic()
        while not work.is_completed():
            waited = time.monotonic() - begun
            if waited > self._wait.total_seconds():
                self._close(device)
                raise RuntimeError(f"not ended after {waited:.1f} s")
            time.sleep(PAUSE_S if waited > EAGER_S else 0)
        work.wait()  # the device's queue goes on behind it; raises what went wrong

    def _close(self, device: torch.device) -> None:
        """Where a backend can: a kernel that waits for ever, and the watchdog that would end the process for it, are over."""
        backend = None if self._group is None else self._group._get_backend(device)
        if backend is not None and backend is not self._backend:
            with suppress(RuntimeError):  # one that can't be aborted
                backend.abort()

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

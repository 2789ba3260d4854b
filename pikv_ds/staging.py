"""Numbers that go between host and device without stopping either.

A copy to or from pageable memory makes the host wait until the device has done all that is queued. So what goes up is put into pinned
memory first, and what comes down is asked for when it is known and waited for when it is needed. On the CPU all of it is free.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def sent(numbers: Sequence[Any] | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of the host as a tensor on the device. Sync: none."""
    host = device.type == "cpu"
    if isinstance(numbers, Tensor):
        if host or numbers.device == device:
            return numbers.to(device, dtype)
        return numbers.to(dtype).pin_memory().to(device, non_blocking=True)
    if host:
        return torch.tensor(numbers, dtype=dtype)
    return torch.tensor(numbers, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


class Arriving:
    """A tensor of the device on its way to the host. On the CPU it is the tensor itself, not a copy."""

    __slots__ = ("_host", "_mark")

    def __init__(self, x: Tensor) -> None:
        """Sync: none."""
        if x.device.type == "cpu":
            self._host, self._mark = x, None
        else:
            self._host, self._mark = x.to("cpu", non_blocking=True), _marked(x.device)

    @property
    def value(self) -> Tensor:
        """On the host. Sync: waits, once, for what the device was asked for before the copy and for nothing after it."""
        if self._mark is not None:
            self._mark.synchronize()
            self._mark = None
        return self._host


def _marked(device: torch.device) -> torch.Event:
    """Where the device's queue is now."""
    mark = torch.Event(device)
    mark.record()
    return mark

"""Numbers that go between host and device without stopping either.

A copy to or from pageable memory makes the host wait until the device has done all that is queued. So what goes up is put into pinned
memory first, and what comes down is asked for when it is known and waited for when it is needed. On the CPU nothing is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


def sent(numbers: Sequence[Any] | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of the host, as they are or in a tensor of `dtype`, on the device. Sync: none."""
    host = device.type == "cpu"
    if not isinstance(numbers, Tensor):
        if host:
            return torch.tensor(numbers, dtype=dtype)
        return torch.tensor(numbers, dtype=dtype, pin_memory=True).to(device, non_blocking=True)
    return numbers if host else numbers.pin_memory().to(device, non_blocking=True)


class Arriving:
    """Tensors of the device on their way to the host, in one copy: integers and bools.

    On the CPU they are the tensors themselves, not copies.
    """

    def __init__(self, *tensors: Tensor) -> None:
        """Sync: none."""
        self._tensors, self._mark = tensors, None
        if tensors[0].device.type != "cpu":
            packed = torch.cat([x.flatten().to(torch.int64) for x in tensors])
            self._packed, self._mark = packed.to("cpu", non_blocking=True), _marked(packed.device)

    @property
    def on_host(self) -> bool:
        """Nobody has to wait for them: there is no copy."""
        return self._mark is None

    @cached_property
    def values(self) -> Sequence[Tensor]:
        """On the host, int64 where they have been copied. Sync: waits, once, for what the device was asked for before the copy."""
        if self._mark is None:
            return self._tensors
        self._mark.synchronize()
        parts = self._packed.split([x.numel() for x in self._tensors])
        return [part.view(x.shape) for part, x in zip(parts, self._tensors, strict=True)]


def _marked(device: torch.device) -> torch.Event:
    """Where the device's queue is now."""
    mark = torch.Event(device)
    mark.record()
    return mark

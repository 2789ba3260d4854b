"""Numbers that go between host and device without stopping either.

A copy to or from pageable memory makes the host wait until the device has done all that is queued. So what goes up is put into pinned
memory first, and what comes down is asked for when it is known and waited for when it is needed. On the CPU nothing is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    """Tensors of the device on their way to the host, in one copy: integers and bools. On the CPU they are the tensors themselves."""

    def __init__(self, *tensors: Tensor) -> None:
        """Sync: none."""
        self.on_host = tensors[0].device.type == "cpu"
        """There is no copy, and nobody has to wait."""
        self._values: Sequence[Tensor] | None = tensors if self.on_host else None
        if not self.on_host:
            packed = torch.cat([x.flatten().to(torch.int64) for x in tensors])
            self._shapes = [x.shape for x in tensors]
            self._packed, self._mark = packed.to("cpu", non_blocking=True), _marked(packed.device)

    @property
    def arrived(self) -> bool:
        """Somebody has looked at them."""
        return self._values is not None

    @property
    def values(self) -> Sequence[Tensor]:
        """On the host, int64 where they have been copied. Sync: waits, once, for what the device was asked for before the copy."""
        if self._values is None:
            self._mark.synchronize()
            parts = self._packed.split([shape.numel() for shape in self._shapes])
            self._values = [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]
        return self._values


def _marked(device: torch.device) -> torch.Event:
    """Where the device's queue is now."""
    mark = torch.Event(device)
    mark.record()
    return mark

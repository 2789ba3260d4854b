"""A 63-bit digest of tensors, to compare what ranks hold without sending it."""

from __future__ import annotations

import torch
from torch import Tensor

_MIX = -7046029254386353131  # odd 64-bit constants (golden ratio, splitmix64); int64 arithmetic wraps
_MIX2 = -4658895280553007687


def digest(tensors: list[Tensor]) -> int:
    """Hash values, order and shapes; equal tensors give equal digests on every rank with the same device kind.

    Args: any dtype; floats are compared by their bits. Sync: one read of the device.
    """
    return int(_mixed(tensors)) & (2**63 - 1) if tensors else 0


def digest_there(tensors: list[Tensor], known: list[Tensor]) -> Tensor:
    """The same as 0-d int64 where `tensors` lie, to be compared there. known: more tensors, of the host. Sync: none."""
    return _mixed(tensors) * 31 + digest(known)


def row_digests(records: Tensor) -> Tensor:
    """[n] int64, of each row of records [n, bytes] uint8, a multiple of 8 bytes: equal rows have equal digests. Sync: none."""
    words = records.contiguous().view(torch.int64)
    place = torch.arange(words.shape[1], device=words.device) * _MIX2 + words.shape[1]
    mixed = (words ^ place) * _MIX
    mixed = (mixed ^ (mixed >> 29)) * _MIX2
    return (mixed ^ (mixed >> 32)).sum(1)


def _mixed(tensors: list[Tensor]) -> Tensor:
    total = None
    for i, tensor in enumerate(tensors):
        flat = tensor.detach().contiguous().view(-1)
        if flat.dtype == torch.bool:
            words = flat.to(torch.int64)
        elif flat.is_floating_point():
            words = flat.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]).to(torch.int64)
        else:
            words = flat.to(torch.int64)
        place = torch.arange(words.numel(), device=words.device) * _MIX2 + (i + 1 + words.numel())
        mixed = (words ^ place) * _MIX
        mixed = (mixed ^ (mixed >> 29)) * _MIX2
        part = (mixed ^ (mixed >> 32)).sum()
        total = part if total is None else total * 31 + part
    assert total is not None, "there is nothing to hash"
    return total

"""pack and unpack, torch reference."""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds.ops import checks


def pack(buffer: Tensor, fields: list[Tensor], index: Tensor | None, offsets: list[int], strides: list[int], rows: list[int]) -> None:
    """The arguments are those of pack.py. Sync: yes (padding is found by a mask)."""
    checks.packed("pack", buffer, fields, index, offsets, strides, rows)
    for field, offset, stride, count in zip(fields, offsets, strides, rows, strict=True):
        source = torch.arange(count, device=buffer.device) if index is None else index.long()
        source = torch.where(source < field.shape[0], source, -1)
        chosen = field.new_full((count, *field.shape[1:]), -1)
        chosen[source >= 0] = field[source[source >= 0]]
        _rows(buffer, chosen, offset, stride, count).copy_(_bytes(chosen))


def unpack(buffer: Tensor, fields: list[Tensor], index: Tensor | None, offsets: list[int], strides: list[int]) -> None:
    """The arguments are those of pack.py. Sync: yes (dropped rows are found by a mask)."""
    rows = [field.shape[0] if index is None else index.shape[0] for field in fields]
    checks.packed("unpack", buffer, fields, index, offsets, strides, rows)
    for field, offset, stride, count in zip(fields, offsets, strides, rows, strict=True):
        stored = _rows(buffer, field, offset, stride, count)
        if index is None:
            _bytes(field).copy_(stored)
        else:
            _bytes(field)[index[index >= 0].long()] = stored[index >= 0]


def _bytes(x: Tensor) -> Tensor:
    """[rows, bytes of a row], a view."""
    return x.view(x.shape[0], x.shape[1:].numel()).view(torch.uint8)


def _rows(buffer: Tensor, field: Tensor, offset: int, stride: int, count: int) -> Tensor:
    """[count, bytes of a row] of the buffer, a view."""
    width = field.shape[1:].numel() * field.element_size()
    return buffer.view(-1).as_strided((count, width), (stride, 1), buffer.storage_offset() + offset)

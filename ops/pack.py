"""Rows of several tensors into one buffer for a collective, and back."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .library import OPS


def pack(
    buffer: Tensor,
    fields: Sequence[Tensor],
    *,
    offsets: Sequence[int],
    strides: Sequence[int],
    rows: Sequence[int],
    index: Tensor | None = None,
) -> None:
    """Copy rows of each field to where they lie in the buffer, in place and bit by bit.

    Row r of field i goes to buffer bytes offsets[i] + r * strides[i]. With strides = the bytes of a whole record ([q | k | v | ids]) that
    is one record per row (`record_layout`); with strides = the bytes of a field's row it is one section per field, as in a gather.

    Args:
        buffer: contiguous uint8 of any shape, changed. Bytes between the fields are left alone.
        fields: [n, ...] each, contiguous; f64, f32, bf16, fp16 or integers.
        rows: rows of each field in the buffer. Rows beyond a field's own n are padding: -1 in its dtype.
        index: [rows] int32 or int64, the row of the fields that becomes row r; -1 = padding. None = row r.

    Raises: RuntimeError: a field does not fit, or the index names a row that is not there.
    Sync: none in compiled versions. Cost: reads and writes each row once.
    """
    OPS.pack(buffer, fields, index, offsets, strides, rows)


def unpack(
    buffer: Tensor, fields: Sequence[Tensor], *, offsets: Sequence[int], strides: Sequence[int], index: Tensor | None = None
) -> None:
    """The inverse of `pack`: copy rows of the buffer into each field, in place.

    Args:
        fields: [n, ...] each, contiguous, changed.
        index: [rows] int32 or int64, the row of the fields that row r of the buffer goes to, each at most once; -1 = dropped. None = row r.

    Where no index is needed, views of the buffer cost less: buffer[:, start:stop].view(dtype).
    Raises, sync, cost: as `pack`.
    """
    OPS.unpack(buffer, fields, index, offsets, strides)


def record_layout(fields: Sequence[Tensor]) -> tuple[list[int], int]:
    """Offset of each field in a record that holds one row of each, and the bytes of a record.

    Every field starts on a multiple of its element size and so does the next record: views of a packed buffer are aligned.
    """
    offsets, end, align = [], 0, 1
    for field in fields:
        size = field.element_size()
        offsets.append(-(-end // size) * size)
        end, align = offsets[-1] + field.shape[1:].numel() * size, max(align, size)
    return offsets, -(-end // align) * align

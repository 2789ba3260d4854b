"""Sections of records from where far pages lie into staging."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .library import OPS


def gather_sections(
    target: Tensor, source: Sequence[Tensor], records: Tensor, coming: Tensor, *, begins: Sequence[int], first: int, section_bytes: int
) -> None:
    """target[first + slot] gets section s of record records[far], for every (far, slot, s) of `coming`.

    Args:
        target: [num_pages, record_bytes] uint8. source: tensors of such records, one behind the other.
        records: [Q] int64 of far pages. coming: [n, 3] int64.
        begins: the number of the first record of each source, 0 for the first. first: the row of slot 0.
        section_bytes: section s has bytes s * section_bytes to (s + 1) * section_bytes of a record; record_bytes: the record is one.

    Sync: none beyond the copy itself; no lock of the interpreter is held. Cost: n * section_bytes read and written.
    """
    OPS.gather_sections(target, list(source), records, coming, list(begins), first, section_bytes)

"""Byte layout of the buffers that cross ranks. G ranks, N tokens per rank (padded to the largest rank), H heads.

One buffer per collective: a header of HEADER int32, then one section per field, all tokens of a field together, so that both ends
read and write plain strided views and every value keeps its bits (positions never travel as floats).
"""

from __future__ import annotations

from functools import cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from pikv_ds import ops
from pikv_ds.modes import eager

HEADER = 8  # int32 words in front of every buffer
ALIGN = 16  # bytes; every section starts on a multiple, so a section can be viewed in its dtype


class Section(NamedTuple):
    name: str
    shape: tuple[int, ...]  # [N, ...]
    dtype: torch.dtype
    start: int
    stop: int


class Layout:
    """Sections of one buffer, for example q, k, v, expert_ids and positions of N tokens."""

    def __init__(self, fields: list[tuple[str, tuple[int, ...], torch.dtype]]) -> None:
        self.sections: list[Section] = []
        end = HEADER * 4
        for name, shape, dtype in fields:
            start = -(-end // ALIGN) * ALIGN
            end = start + prod(shape) * dtype.itemsize
            self.sections.append(Section(name, shape, dtype, start, end))
        self.nbytes = -(-end // ALIGN) * ALIGN

    def pack(self, header: Tensor, values: dict[str, Tensor], device: torch.device) -> Tensor:
        """header int32 [HEADER] and the fields of this rank (at most N tokens each) -> uint8 [nbytes]. Sync: none.

        Padding tokens read as position -1: never stored, never used. The section of a field that is not given holds anything.
        """
        sent = [section for section in self.sections if section.name in values]
        for name, _, dtype, _, _ in sent:
            assert values[name].dtype == dtype, f"{name} is {values[name].dtype}, its section {dtype}"
        buffer = torch.empty(self.nbytes, dtype=torch.uint8, device=device)
        ops.pack(
            buffer,
            [header.view(1, HEADER), *(values[section.name].contiguous() for section in sent)],
            offsets=[0, *(section.start for section in sent)],
            strides=[HEADER * 4, *(prod(section.shape[1:]) * section.dtype.itemsize for section in sent)],
            rows=[1, *(section.shape[0] for section in sent)],
        )
        return buffer

    def unpack(self, buffers: Tensor) -> dict[str, Tensor]:
        """uint8 [G, nbytes] -> fields [G, N, ...], views of the buffer. Sync: none."""
        ranks = buffers.shape[0]
        return {s.name: buffers[:, s.start : s.stop].view(s.dtype).view(ranks, *s.shape) for s in self.sections}


@cache
@eager
def no_header(device: torch.device) -> Tensor:
    """[HEADER] int32 zeros, for records after the first of a forward: nobody reads theirs."""
    return torch.zeros(HEADER, dtype=torch.int32, device=device)


def headers_of(buffers: Tensor) -> list[list[int]]:
    """uint8 [G, nbytes] -> the G headers, on the host. Sync: reads the device; once per forward."""
    return buffers[:, : HEADER * 4].view(torch.int32).tolist()

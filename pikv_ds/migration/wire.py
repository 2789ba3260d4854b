"""Bytes for every rank, and whether all ranks can send and take them. G ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pikv_ds.exchange.exchange import Exchange

UNABLE = -1


class Received(NamedTuple):
    """blocks: uint8 of each rank, None where some rank could not send or take: then nobody has sent anything. facts: of each rank."""

    blocks: list[Tensor] | None
    facts: list[list[int]]


def swap(exchange: Exchange, blocks: Sequence[Tensor] | None, facts: Sequence[int], device: torch.device, what: str) -> Received:
    """blocks: uint8 [n] for each rank; None: this rank can't. facts: a few integers for all. Three collectives, or one or two.

    Room is made before anything is sent, and all ranks hear whether every one has it: a rank out of memory leaves none of them waiting.
    Sync: reads sizes back. Raises: PeerError.
    """
    sizes = [UNABLE] * exchange.size if blocks is None else [len(block) for block in blocks]
    told = _of_all(exchange, [*sizes, *facts], device, f"{what}: sizes")
    of_ranks, all_facts = [row[: exchange.size] for row in told], [row[exchange.size :] for row in told]
    if blocks is None or any(UNABLE in row for row in of_ranks):
        return Received(None, all_facts)
    if not any(n for row in of_ranks for n in row):
        return Received([block.new_zeros(0) for block in blocks], all_facts)
    coming = [row[exchange.rank] for row in of_ranks]
    try:
        leaving, room = torch.cat(list(blocks)), torch.empty(sum(coming), dtype=torch.uint8, device=device)
    except (RuntimeError, MemoryError):  # torch's, and Python's: out of memory
        leaving, room = None, None
    able = _of_all(exchange, [int(room is not None)], device, f"{what}: room")
    if leaving is None or room is None or not all(yes for (yes,) in able):
        return Received(None, all_facts)
    received = exchange.all_to_all_rows(leaving, sizes, coming, f"{what}: pages", into=room)
    return Received(list(received.split(coming)), all_facts)


def _of_all(exchange: Exchange, values: Sequence[int], device: torch.device, what: str) -> list[list[int]]:
    return exchange.all_gather(torch.tensor(values, dtype=torch.int64, device=device), what).tolist()


def packed(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """uint8 [n], one after the other."""
    parts = [x.contiguous().flatten().view(torch.uint8) for x in tensors if x.numel()]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.uint8, device=device)


class Unpacked:
    """Reads what `packed` wrote."""

    def __init__(self, block: Tensor) -> None:
        self.block, self.at = block, 0

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A copy. Raises: ValueError when the block ends before."""
        count = torch.Size(shape).numel() * dtype.itemsize
        if self.at + count > len(self.block):
            raise ValueError(f"{len(self.block)} bytes were received, and {self.at + count} are asked for")
        part, self.at = self.block[self.at : self.at + count], self.at + count
        return part.clone().view(dtype).view(tuple(shape))

    def end(self) -> None:
        """Raises: ValueError when something is left."""
        if self.at != len(self.block):
            raise ValueError(f"{len(self.block)} bytes were received, and {self.at} are what was to come")

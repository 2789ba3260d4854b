"""Which shards change ranks between two maps, and the numbers of a move. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from pikv_ds.placement.shard_map import ShardMap


class Move(NamedTuple):
    """A shard comes from its home, rank `source`, to rank `target`, which does not hold it yet; the home may keep it."""

    shard: int
    source: int
    target: int


def moves(present: ShardMap, wanted: ShardMap) -> list[Move]:
    """By shard, ascending; the same on all ranks."""
    return [
        Move(shard, present.home(shard), target)
        for shard in range(present.num_shards)
        for target in sorted(set(wanted.holders[shard]) - set(present.holders[shard]))
    ]


@dataclass(slots=True)
class Progress:
    """Of all moves of a cache on this rank, since it was made. Seconds of wall time, bytes of payload that left this rank."""

    started: int = 0
    committed: int = 0
    rolled_back: int = 0
    cancelled: int = 0
    shards_moved: int = 0
    """By all ranks."""
    experts_moved: int = 0
    """Of the model, with their shards, by all ranks; the same slots in all layers are one."""
    expert_bytes: int = 0
    """Of these that left this rank; not among bytes_sent."""
    slices: int = 0
    """Forwards in which pages were copied ahead."""
    bytes_sent: int = 0
    bytes_ahead: int = 0
    """Of these, pages that were copied ahead, between forwards."""
    bytes_again: int = 0
    """Of pages that were copied ahead in vain: they changed, left or were not needed any more."""
    stall_s: float = 0.0
    """The longest that a commit kept a forward waiting."""
    slice_s: float = 0.0
    """The longest that copying ahead kept a forward waiting."""

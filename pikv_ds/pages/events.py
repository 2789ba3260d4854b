"""What watchers of pages are told: entries that were stored, that moved to other pages, that hold other numbers now."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Written(NamedTuple):
    """Where the N tokens of an append went."""

    slot_mapping: Tensor  # [N] int32, page * page_size + offset; -1 = not stored here
    shard: Tensor | None  # [N] int64 global shard; None = the only one
    valid: Tensor  # [N] bool, stored on whatever rank
    here: Tensor  # [N] bool, stored on this one


@dataclass(frozen=True, slots=True, kw_only=True)
class NewEntries:
    """Tokens of a forward in one layer, those of all shards: every rank has them."""

    k: Tensor
    """[N, H, D]; anything where not valid."""
    rows: Tensor
    """[N] int64, ascending."""
    positions: Tensor
    """[N] int32."""
    shard: Tensor
    """[N] int64 global shard."""
    valid: Tensor
    """[N] bool: stored, on whatever rank."""
    slot_mapping: Tensor
    """[N] int32 page * page_size + offset; -1 = not stored here."""
    table: Tensor
    """[N] int32 row * S + local shard, 0 where not stored here: the tail row of a token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnedEntries:
    """Rows whose keys, and queries, were turned: x -> x turn, x [..., H, r] one or a group of heads of a row."""

    rows: Tensor
    """[n] int64, ascending: the same on all ranks."""
    turn: Tensor
    """[n, H, r, r] f32, of all ranks' rows."""
    entries: NewEntries
    """All entries of these rows on this rank, keys as they are read from now on."""

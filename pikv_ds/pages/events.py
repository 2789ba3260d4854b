"""What watchers of a layer's pages are told. Five events, synchronous; columns and rows move by themselves and need none.

| event | when | who listens |
|---|---|---|
| `wrote` | entries were stored; in the step, so nothing may be read back to the host | a router |
| `rebuilt` | pages hold other numbers: they came from another pool, or their keys have another basis | a router, the shares of attention |
| `moved` | pages have other ids, or a fork got a copy; contents are the same | what names pages from outside |
| `dropped` | a budget takes pages, of whatever rank | who knows of pages on other ranks |
| `freed` | nobody names a page any more | what names pages from outside |

A watcher may not change pages. All but `wrote` are told in the host phase, between forwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from pikv_ds.step.step import Step


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


class Rebased(NamedTuple):
    """Keys and queries of some rows have another basis from now on: x -> x by, x [..., H, r] one or a group of heads of a row."""

    rows: Tensor
    """[n] int64, ascending: the same on all ranks."""
    by: Tensor
    """[n, H, r, r] f32, of all ranks' rows."""


@dataclass(frozen=True, kw_only=True)
class PageChange:
    """Pages of one pool of a layer hold other numbers than before."""

    layer: int
    level: int
    """Which of the layer's pools, 0 the nearest: that one has what the layer is given, so queries change their basis with it."""
    basis: Rebased | None
    """None: the pages have come from another pool, where `wrote` gave their entries no slot."""
    read: Callable[[], NewEntries]

    @cached_property
    def entries(self) -> NewEntries:
        """All entries of these pages on this rank, from the first slot of each page on, keys as they are read from now on. Decodes them."""
        return self.read()


class PageMove(NamedTuple):
    """Pages `target` of a pool hold what pages `source` held, [n] int64 ids each."""

    level: int
    source: Tensor
    target: Tensor
    copied: bool
    """The sources go on beside them (two forks write to what was one page); otherwise all pages of the pool are named, and no other is."""


@dataclass(slots=True)
class PageEvents:
    """Who is told, of one layer. Empty tuples cost nothing: what is told is not even made."""

    wrote: tuple[Callable[[int, Step, Tensor, Written], None], ...] = ()
    """(layer, forward, keys [N, H, D] as the layer is given them, where they went)."""
    rebuilt: tuple[Callable[[PageChange], None], ...] = ()
    moved: tuple[Callable[[PageMove], None], ...] = ()
    dropped: tuple[Callable[[int, Tensor], None], ...] = ()
    """(layer, [R, S, C] bool pages of the shards of all ranks that leave)."""
    freed: tuple[Callable[[int, Tensor], None], ...] = ()
    """(level of the pool, [n] int64 page ids)."""

"""What moves with the shards: state of a host that changes ranks in the same transaction as the entries. G ranks, S shards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pikv_ds.errors import MigrationError
from pikv_ds.exchange.exchange import Exchange
from pikv_ds.placement.shard_map import ShardMap

from .wire import swap

Holders = tuple[tuple[int, ...], ...]


class Claim(NamedTuple):
    """One thing that moves: rank `source` has sent it, `target` has stored it, and both must say the same checksum."""

    what: str
    source: int
    target: int


class Along(Protocol):
    """Owned by a model, shared by all of its caches; a move asks in this order. Nothing that runs may change before `commit`.

    All ranks call alike. `leaving` and `arrived` may raise RuntimeError, MemoryError or ValueError: then nobody commits.
    """

    def holders(self, num_shards: int) -> Holders | None:
        """The map of shards by which the state lies now, for caches that begin; None: any."""

    def due(self, wanted: ShardMap) -> bool:
        """Whether something would move to that map."""

    def leaving(self, wanted: ShardMap) -> list[Tensor]:
        """uint8 for each rank. Raises as said above also where this rank finds that nothing may move just now."""

    def plan(self) -> int:
        """Of the move that `leaving` has begun: a digest, equal on all ranks or there is no move."""

    def arrived(self, blocks: Sequence[Tensor]) -> None:
        """uint8 of each rank: store it beside what runs, whole, so that `commit` needs nobody."""

    def claims(self) -> list[Claim]:
        """Of the move, the same on all ranks."""

    def said(self) -> list[int]:
        """This rank's checksum for every claim that it sent or stored, 0 for the others'."""

    def commit(self) -> None:
        """What was stored takes over. Can be done again where it broke off."""

    def forget(self) -> None:
        """There was no move: give back what was stored."""


class Carried(NamedTuple):
    """uint8 of each rank, and how many bytes have left this one."""

    blocks: list[Tensor]
    sent: int


def carry(exchange: Exchange, along: Along, wanted: ShardMap, device: torch.device) -> Carried:
    """Send and receive what moves with the shards. Collectives and sync: those of `swap`.

    Raises: MigrationError on all ranks when some can't take part. PeerError.
    """
    out: list[Tensor] | None = None
    plan, failed = 0, None
    try:
        out = along.leaving(wanted)
        plan = along.plan()
    except (RuntimeError, MemoryError, ValueError) as error:
        out, failed = None, error
    name = type(along).__name__
    received = swap(exchange, out, [plan], device, f"moving {name} with the shards")
    stay = "every shard stays where it was, on all ranks"
    if out is None or received.blocks is None:
        why = "a rank could not send them, or has no memory for those that come" if failed is None else str(failed)
        raise MigrationError(f"{name} can't move with the shards: {why}; {stay}") from failed
    if any(facts != received.facts[0] for facts in received.facts):
        raise MigrationError(f"{name} can't move with the shards: they lie in another order on some rank; {stay}")
    return Carried(received.blocks, sum(len(block) for block in out))

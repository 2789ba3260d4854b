"""Queries that travel whole, or each kv head of them by itself: a rank then gets the heads that read there, and no others.

G ranks, N tokens of a rank (padded), n of this one, U units of a query: the heads of its page lists, or 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pikv_ds.exchange.routes import Arrived


class Asked(NamedTuple):
    """Which of this rank's queries go to which ranks."""

    ranks: Tensor
    """bool [G, n * U]."""
    fields: list[Tensor]
    """[n * U, ...] each: the queries, and what comes with them."""
    units: int = 1


class Sent(NamedTuple):
    """What has left and what has come."""

    need: Tensor
    """bool [2, G, N * U], who got this rank's rows."""
    arrived: Arrived
    units: int


def in_units(ids: Tensor, units: int) -> Tensor:
    """[n] int32 as rows of few bytes, U for each token at most, for a record that has as many rows as there are units."""
    return ids if units == 1 else ids.view(torch.uint8).view(-1, unit_bytes(units))


def from_units(rows: Tensor, num_ranks: int, num_tokens: int, units: int) -> Tensor:
    """The inverse, of all ranks: [G * N * U, ...] -> [G * N] int32."""
    if units == 1:
        return rows
    return rows.view(num_ranks, -1)[:, : num_tokens * 4].contiguous().view(torch.int32).flatten()


def unit_bytes(units: int) -> int:
    """Of an id of 4 bytes in each of U rows, so that they hold it."""
    return 4 if units == 1 else 2 if units < 4 else 1


def token_of(place: Tensor, num_tokens: int, units: int) -> Tensor:
    """Entries stand at the first N of the N * U places of a rank: place [E] int32 -> token of all ranks, -1 = none."""
    if units == 1:
        return place
    places = num_tokens * units
    return torch.where(place >= 0, place // places * num_tokens + place % places, -1)

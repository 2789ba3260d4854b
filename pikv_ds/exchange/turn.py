"""Where a cache stands in the order of collectives that all ranks follow, and when it must say so before it goes on.

Records carry no lengths, and a record that meets a longer one ends the process. So a rank sends a record only where every rank that has
followed the order expects just this one: the next of the same forward, or the first of the next forward of the same cache. Before
anything else it sends a frame, which meets only frames.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from .frame import Frame, Kind
from .group_state import GroupState


@dataclass(frozen=True, slots=True)
class Told:
    """What a cache tells about itself. facts: pairs of name and value that must be equal on all ranks, read once for each opening.

    header: integers of this rank's part of the forward. state: what decides how long its records are.
    """

    num_layers: int
    facts: Callable[[], list[tuple[str, str]]]
    header: Callable[[], list[int]]
    state: Callable[[], Any]


class Turn:
    """Of one cache; borrows what is known about its group."""

    def __init__(self, group: GroupState, told: Told) -> None:
        self.group, self.told = group, told
        self.cache = 0  # its number on the group; 0 = never opened
        self.forward = 0
        self.headers: list[list[int]] | None = None
        """Of all ranks, where a frame has carried them in the running forward."""
        self.facts_text = b""
        self._route: list[tuple[int, Any]] = [(layer, None) for layer in range(told.num_layers)]
        self._place = self._ended = 0  # layers of the running forward, and of the one before
        self._opened = self._entered = self._broke_off = self._detour = self._inside = False

    # ---- told by the cache ---------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """A forward begins. One before that has made a collective and did not end has broken off."""
        self._broke_off |= self._entered
        self._entered, self._ended, self._place, self.headers = False, self._place, 0, None
        self._inside = False

    def finish(self) -> None:
        """No layer follows in this forward, only what is sent at its end. If some were left out, the others must hear of it first."""
        self._detour |= self._place != len(self._route)

    def end(self) -> None:
        """The forward has ended."""
        self._entered, self.headers = False, None

    def close(self) -> None:
        """The cache is empty again: its next forward is a first one."""
        self._opened = self._entered = self._broke_off = self._inside = False
        self._ended = self._place = self.forward = 0
        self.headers = None

    def step(self, layer: int, shape: Any) -> None:
        """A layer begins. shape: what besides the layer's specification decides how long its records are."""
        place, self._place = self._place, self._place + 1
        self._detour |= self._inside  # the layer before was left midway
        self._inside = True
        if place == len(self._route):
            self._route.append((layer, None))
            self._detour = True
        known_layer, known = self._route[place]
        if known_layer == layer and known == shape:
            return
        told = self.headers is None if place == 0 else shape == self._route[0][1]  # a frame is still to come, or as in the first layer
        self._detour |= known_layer != layer or known is not None or not told
        self._route[place] = (layer, shape)

    def stepped(self) -> None:
        """The layer has made all its collectives."""
        self._inside = False

    # ---- asked by the exchange -----------------------------------------------------------------------------------------------

    def due(self, what: str, *, always: bool = False) -> Frame | None:
        """The frame to send before a collective; None: all ranks expect the collective."""
        if not self._entered:
            self.forward += 1
        self._entered = True
        if not self._opened:
            self.facts_text = json.dumps(self.told.facts()).encode()
            return self._frame(Kind.OPEN, what, facts=_digest(self.facts_text))
        if always or self._broke_off or self._detour or self.group.holder != self.cache:
            return self._frame(Kind.FORWARD, what)
        return None

    def answered(self, frames: list[Frame]) -> None:
        """All ranks have said the same, and their facts are equal."""
        if not self.cache:
            self.group.caches += 1
            self.cache = self.group.caches
        self.group.holder = self.cache
        self.headers = [list(frame.payload) for frame in frames]
        self._opened, self._broke_off, self._detour = True, False, False

    def says(self, what: str) -> str:
        """Where this rank is in its forward, for errors of others."""
        return f"forward {self.forward} of cache {self.cache} ({what})"

    def _frame(self, kind: Kind, what: str, facts: int = 0) -> Frame:
        return Frame(
            kind=kind, what=what, cache=self.cache, forward=self.forward, place=self._place, value=int(self._broke_off), facts=facts,
            state=_digest(repr((self.told.state(), self._ended, self._route[: self._place])).encode()), calls=self.group.calls,
            payload=tuple(self.told.header()),
        )  # fmt: skip


def _digest(text: bytes) -> int:
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little") >> 1


def differing(texts: list[bytes]) -> list[str]:
    """The facts that differ between ranks, in the order of the first rank that has them: "NAME = VALUE on rank 0, VALUE on rank 1"."""
    facts = [dict(json.loads(text)) for text in texts]
    names = dict.fromkeys(name for of_rank in facts for name in of_rank)
    unlike = [name for name in names if any(of_rank.get(name) != facts[0].get(name) for of_rank in facts)]
    return [f"{name} = " + ", ".join(f"{of_rank.get(name, 'not there')} on rank {r}" for r, of_rank in enumerate(facts)) for name in unlike]

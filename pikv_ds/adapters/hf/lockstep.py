"""Ranks of a group in step, whatever caches live on it: before each forward of a generate() all ranks say which cache they will run next.

A rank that has nothing to do, or something else, runs a forward without tokens on the cache that the others need: entries of all ranks'
requests lie on all ranks. One frame per forward.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol
from weakref import WeakKeyDictionary, WeakValueDictionary, ref

import torch.distributed as dist

from pikv_ds.errors import PIKV_ERRORS, PeerError
from pikv_ds.exchange.exchange import Exchange

from .conversation import Conversation

DROPS = 3  # numbers of dropped caches that ride in a frame


class Wish(NamedTuple):
    """A cache that a rank will run: its number on the group, 0 = a new one of `attachment` with `layers` layers. Larger ones go first."""

    new: int
    number: int
    attachment: int
    layers: int

    @classmethod
    def of(cls, conversation: Conversation) -> Wish:
        number = conversation.core.number
        return cls(int(not number), number, conversation.attachment, len(conversation.layers))


class Maker(Protocol):
    """What is asked of an attachment (attachment.py)."""

    def join(self, num_layers: int, *, in_a_loop: bool) -> Conversation: ...

    def run_idle(self, conversation: Conversation) -> None: ...


class Lockstep:
    """One per process group and process."""

    def __init__(self) -> None:
        self._makers: list[ref[Maker]] = []
        self._known: WeakValueDictionary[int, Conversation] = WeakValueDictionary()
        self._kept: dict[int, Conversation] = {}
        """Those that nobody holds on this rank and others may go on with; and, inside of generate(), those that may become such."""
        self._new: list[Conversation] = []  # joined, and not opened yet
        self._gone: dict[int, set[int]] = {}
        """By number, the ranks on which nobody holds it any more."""
        self._to_tell: list[int] = []  # numbers that nobody holds here, which the other ranks have not been told yet
        self._awaited: Wish | None = None
        """What the other ranks run next, while this one is not active."""
        self._waited_for = False
        """This rank has left a generate() while others are in a loop of lockstep()."""
        self._thread = threading.local()

    def add(self, maker: Maker) -> int:
        """The number of an attachment: ranks attach in the same order."""
        self._makers.append(ref(maker))
        return len(self._makers) - 1

    @contextmanager
    def generating(self, exchange: Exchange) -> Iterator[None]:
        """Forwards inside are in step. At the end of the outermost one this rank stays until the others are done as well."""
        depth = self._depth
        self._thread.depth = depth + 1
        try:
            yield
        finally:
            self._thread.depth = depth
        if not depth:
            while (chosen := self._meet(exchange, None, leaves=True)[0]) is not None:
                self._run_idle(chosen)
            self._kept = {number: one for number, one in self._kept.items() if not one.is_held}

    def leave(self, exchange: Exchange) -> None:
        """The last of a rank that goes: those that wait in a loop of theirs for its next generate() need not."""
        if self._waited_for:
            self._meet(exchange, None)

    def before_forward(self, conversation: Conversation) -> None:
        """Of a generate(): until all ranks are ready for it, run what they need first."""
        if not self._depth or self.runs_idle:
            return
        while (chosen := self._meet(conversation.core.ranks, Wish.of(conversation))[0]) != Wish.of(conversation):
            self._run_idle(chosen)

    @property
    def runs_idle(self) -> bool:
        """The running forward of this thread is one for other ranks."""
        return getattr(self._thread, "idle", False)

    def ask(self, active: bool, conversation: Conversation) -> bool:
        """lockstep() of a loop of the user's own: True while any rank of the group is active, or between two generate() of its loop."""
        own = Wish.of(conversation)
        while True:
            chosen, between = self._meet(conversation.core.ranks, own if active else None)
            if chosen is not None and not active and (chosen.attachment, chosen.layers) != (own.attachment, own.layers):
                self._run_idle(chosen)  # of another model, or of its first layers: not a forward of the loop that asks
            elif chosen is not None or not between:
                break
        self._awaited = None if active else chosen
        return chosen is not None

    def awaited(self, otherwise: Conversation) -> Conversation:
        """The conversation of the next idle forward, for a rank that is not active."""
        return otherwise if self._awaited is None else self._find(self._awaited, in_a_loop=True)

    def released(self, conversation: Conversation) -> None:
        """Nobody holds it on this rank any more. Its entries go now, but inside of generate(), where the ranks are at different calls."""
        number = conversation.held_core.number
        if not number or conversation.ended is not None or conversation.told:  # told: it was held for an idle forward
            return
        conversation.told = True
        self._to_tell.append(number)
        if not self._depth and not conversation.joined:
            self._kept.pop(number, None)

    def opened(self, conversation: Conversation) -> None:
        """A forward of it has run: the group has numbered it."""
        number = conversation.core.number
        if not number:
            return
        self._known[number] = conversation
        if conversation.joined or (self._depth and conversation.core.holds_others):
            self._kept[number] = conversation
        self._new = [one for one in self._new if one is not conversation]

    @property
    def _depth(self) -> int:
        """Of generate() in this thread."""
        return getattr(self._thread, "depth", 0)

    def _meet(self, exchange: Exchange, wish: Wish | None, *, leaves: bool = False) -> tuple[Wish | None, bool]:
        """What runs next, None = no rank is active; and whether some rank is only leaving a generate()."""
        told, self._to_tell = self._to_tell[:DROPS], self._to_tell[DROPS:]
        words = (int(leaves), *(wish or Wish(0, 0, 0, 0)), *told)
        said = exchange.lockstep_with(wish is not None, words)
        self._let_go(said, exchange)
        wishes = [Wish(*words[1:5]) for active, words in said if active]
        self._waited_for = leaves and not wishes and not all(words[0] for _, words in said)
        return max(wishes, default=None), any(words[0] for _, words in said)

    def _let_go(self, said: list[tuple[bool, tuple[int, ...]]], exchange: Exchange) -> None:
        """Of what is kept for the other ranks, what none of them holds any more."""
        for rank, (_, words) in enumerate(said):
            for number in words[5:]:
                if number:
                    self._gone.setdefault(number, set()).add(rank)
        over = [number for number, ranks in self._gone.items() if len(ranks - {exchange.rank}) == exchange.size - 1]
        for number in over:
            del self._gone[number]
            self._kept.pop(number, None)
        self._kept = {number: one for number, one in self._kept.items() if one.ended is None}

    def _find(self, wish: Wish, *, in_a_loop: bool = False) -> Conversation:
        conversation = self._known.get(wish.number)
        if wish.new:
            maker = self._makers[wish.attachment]()
            if maker is None:
                raise PeerError(
                    "another rank opens a cache of a model that is not attached here any more; attach and detach alike on all ranks"
                )
            conversation = maker.join(wish.layers, in_a_loop=in_a_loop)
            self._new.append(conversation)
        if conversation is None or conversation.ended is not None:
            raise PeerError(
                f"another rank goes on with cache {wish.number} of the group, which this rank has closed or dropped; its entries are gone. "
                "Keep a cache on all ranks until none of them needs it"
            )
        return conversation

    def _run_idle(self, wish: Wish) -> None:
        conversation = self._find(wish)
        maker = self._makers[conversation.attachment]()
        self._thread.idle = True
        try:
            maker.run_idle(conversation)
        except PIKV_ERRORS:
            raise
        except Exception as error:
            raise PeerError(
                f"a forward without tokens, which this rank ran because another rank of the group runs one with {wish.layers} layers, "
                f"failed, and so will that one: {type(error).__name__}: {error}"
            ) from error
        finally:
            self._thread.idle = False


def lockstep_of(group: dist.ProcessGroup | None) -> Lockstep:
    """That of a group; of None, one that nobody shares."""
    return Lockstep() if group is None else _LOCKSTEPS.setdefault(group, Lockstep())


_LOCKSTEPS: WeakKeyDictionary[dist.ProcessGroup, Lockstep] = WeakKeyDictionary()

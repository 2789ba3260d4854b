"""Which tokens the rows of a generation hold, without asking the device while it runs. B rows, T columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

_owners = count()


@dataclass(slots=True)
class Tokens:
    """Tokens of a row from its first on, and whose they are: parts (owner, end), each from the end of the one before. Rows that share a
    part share its entries, as one of them was forked from the other."""

    tokens: list[int] = field(default_factory=list)
    parts: list[tuple[int, int]] = field(default_factory=list)

    @classmethod
    def alone(cls, tokens: Sequence[int]) -> Tokens:
        """Of a row that shares no part with another."""
        return cls(list(tokens), [(next(_owners), len(tokens))] if tokens else [])

    def cut(self, length: int) -> Tokens:
        """Its first `length` tokens."""
        parts, start = [], 0
        for owner, end in self.parts:
            if start < length:
                parts.append((owner, min(end, length)))
            start = end
        return Tokens(self.tokens[:length], parts)


class TokenLog:
    """Of one generation: forwards, forks and crops as they came; `rows` replays them."""

    def __init__(self) -> None:
        self.begin([])

    def begin(self, rows: Sequence[Tokens]) -> None:
        """rows: what each row holds already."""
        self._rows = list(rows)
        self._events: list[tuple[str, object]] = []
        self._stored = 0
        self.known = True
        """False: something was stored whose tokens, or whose places, are not those that a log can hold."""
        self._wrong: Tensor | None = None

    def add(self, tokens: Tensor, mask: Tensor | None, wrong: Tensor | None) -> None:
        """A forward has stored tokens [B, T] ints, of which mask [B, T] bool on the host are no padding; None: all.

        wrong: 0-d bool on the device, its keys are rotated to other places than those of the tokens in their rows. Sync: none.
        """
        self._events.append(("tokens", (tokens.clone(), mask)))
        if wrong is not None:
            self._wrong = wrong if self._wrong is None else self._wrong | wrong

    def ran(self) -> None:
        """A forward has run: what came before is as the cache holds it. What comes later waits for the next one."""
        self._stored = len(self._events)

    def select(self, index: list[int]) -> None:
        """Row i continues row index[i]."""
        self._events.append(("select", list(index)))

    def keep(self, lens: list[int]) -> None:
        """Rows are cut to so many tokens."""
        self._events.append(("keep", list(lens)))

    def rows(self) -> list[Tokens] | None:
        """What rows held after the last forward; None: not known. Sync: reads the device."""
        if not self.known or (self._wrong is not None and bool(self._wrong)):
            return None
        rows = [Tokens(list(row.tokens), list(row.parts)) for row in self._rows]
        own = [False] * len(rows)  # whether the last part of a row is its own to grow
        for kind, value in _merged(self._events[: self._stored]):
            if kind == "tokens":
                for b, new in enumerate(value):
                    _grow(rows[b], new, own[b])
                    own[b] = own[b] or bool(new)
            else:
                rows = [rows[i].cut(len(rows[i].tokens)) for i in value] if kind == "select" else [
                    row.cut(n) for row, n in zip(rows, value, strict=True)
                ]  # fmt: skip
                own = [False] * len(rows)
        return rows

    def settle(self, rows: Sequence[Tokens]) -> None:
        """rows: what `rows` has just said, which need not be replayed again. What waits for the next forward goes on waiting."""
        self._rows, self._events, self._stored = list(rows), self._events[self._stored :], 0


def _grow(row: Tokens, new: list[int], own: bool) -> None:
    if new:
        row.tokens += new
        if own:
            row.parts[-1] = (row.parts[-1][0], len(row.tokens))
        else:
            row.parts.append((next(_owners), len(row.tokens)))


def _merged(events: list[tuple[str, object]]):
    """Events, with neighbouring forwards as one: [B] lists of tokens, read from the device at once."""
    waiting: list[tuple[Tensor, Tensor | None]] = []
    for kind, value in [*events, ("end", None)]:
        if kind == "tokens":
            waiting.append(value)
            continue
        if waiting:
            yield "tokens", _lists(waiting)
            waiting = []
        if kind != "end":
            yield kind, value


def _lists(forwards: list[tuple[Tensor, Tensor | None]]) -> list[list[int]]:
    ids = torch.cat([tokens for tokens, _ in forwards], 1).tolist()
    if all(mask is None for _, mask in forwards):
        return ids
    masks = torch.cat([torch.ones(tokens.shape, dtype=torch.bool) if mask is None else mask.cpu() for tokens, mask in forwards], 1)
    return [[token for token, real in zip(row, own, strict=True) if real] for row, own in zip(ids, masks.tolist(), strict=True)]

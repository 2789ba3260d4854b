"""Which rows stay parked, and which of them a new request begins like: least recently used rows go first, by tokens. Pure, one rank's own.

Rows are numbered as in a change of rows: those of the last generation, then the parked ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .index import BLOCK, PrefixIndex
from .log import Tokens

Source = tuple[int, int]
"""(row, tokens that stay of it)."""


@dataclass(slots=True)
class Held:
    """A row that others may begin as. used: when somebody last did, or it ended; larger is later."""

    number: int
    row: Tokens
    used: int


class PrefixStore:
    """Order of calls: ended, find for every new request, plan, and settled once the forward that the plan was for has run."""

    def __init__(self, budget_tokens: int) -> None:
        self.budget_tokens = budget_tokens
        self.looked_up = self.reused = self.requests = self.hits = 0
        """Tokens of prompts that were looked up, those of them that were reused; prompts, those of them that reused some."""
        self._clock = 0
        self.clear()

    def clear(self) -> None:
        """The cache holds no parked row any more."""
        self.parked: list[Held] = []
        self._rows: list[Held | None] | None = None  # by number, between `ended` and `settled`
        self._next: list[Held] = []
        self._index = PrefixIndex()

    @property
    def knows_rows(self) -> bool:
        """`ended` has been called, and `settled` not yet."""
        return self._rows is not None

    @property
    def parked_tokens(self) -> int:
        """Of all parked rows, those that rows share counted once."""
        return _Shared().add_all(self.parked)

    def ended(self, rows: Sequence[Tokens | None]) -> None:
        """The last generation's rows; None: what it holds is not known. A second call before `settled` says nothing new."""
        if self._rows is not None:
            return
        ended = [None if row is None else Held(self._tick(), row, self._clock) for row in rows]
        for held in ended:
            if held is not None:
                self._index.hold(held.number, held.row.tokens)
        self._rows = [*ended, *self.parked]

    def void(self, num_rows: int) -> None:
        """Nothing that was stored so far can be used: neither the last generation's rows, so many, nor parked ones. In place of `ended`."""
        unknown: list[Held | None] = [None] * (num_rows + len(self.parked))
        self.clear()
        self._rows = unknown

    def find(self, prompt: Sequence[int]) -> Source:
        """The row that begins like a prompt; its last token is left to run, as its logits are asked for. (-1, 0): none does."""
        match = self._index.match(prompt[:-1])
        if match is None:
            return -1, 0
        row = next(i for i, held in enumerate(self._rows) if held is not None and held.number == match.number)
        return row, match.length

    def took(self, prompts: int, tokens: int, sources: Sequence[Source]) -> list[Tokens]:
        """Requests begin as these, of prompts of so many tokens in all. Returns what each of their rows holds."""
        self.requests, self.looked_up = self.requests + prompts, self.looked_up + tokens
        self.reused += sum(keep for _, keep in sources)
        self.hits += sum(keep > 0 for _, keep in sources)
        for row in {row for row, keep in sources if keep}:
            self._rows[row].used = self._tick()
        return [self._rows[row].row.cut(keep) if keep else Tokens() for row, keep in sources]

    def plan(self) -> list[Source]:
        """The rows that are to be parked, within the budget, the latest used first; one that is another's beginning is not."""
        numbered = [(i, held) for i, held in enumerate(self._rows) if held is not None and len(held.row.tokens) >= BLOCK]
        chosen, shared = [], _Shared()
        for i, held in sorted(numbered, key=lambda one: -one[1].used):
            tokens = held.row.tokens
            if any(other.row.tokens[: len(tokens)] == tokens for _, other in chosen):
                continue
            fits = shared.fits(held.row, self.budget_tokens)
            if fits >= BLOCK:
                row = held.row if fits == len(tokens) else held.row.cut(fits)
                shared.add(row)
                chosen.append((i, Held(held.number, row, held.used)))
        chosen = [one for one in chosen if not _begins_another(one[1], chosen)]
        self._next = [held for _, held in chosen]
        return [(i, len(held.row.tokens)) for i, held in chosen]

    def settled(self) -> None:
        """The forward has run: what was planned is parked."""
        stays = {held.number for held in self._next}
        for held in self._rows or ():
            if held is not None and held.number not in stays:
                self._index.forget(held.number)
        for held in self._next:
            self._index.hold(held.number, held.row.tokens)
        self.parked, self._rows, self._next = self._next, None, []

    def _tick(self) -> int:
        self._clock += 1
        return self._clock


def _begins_another(held: Held, chosen: list[tuple[int, Held]]) -> bool:
    tokens = held.row.tokens
    longer = (other.row.tokens for _, other in chosen if len(other.row.tokens) > len(tokens))
    return any(other[: len(tokens)] == tokens for other in longer)


class _Shared:
    """Tokens of rows, those of a part that they share counted once."""

    def __init__(self) -> None:
        self.tokens = 0
        self._ends: dict[int, int] = {}

    def _new(self, row: Tokens) -> list[tuple[int, int, int]]:
        """(owner, first, end) of what is not counted yet; first may be past the end."""
        starts = [0, *(end for _, end in row.parts)]
        return [(owner, max(start, self._ends.get(owner, 0)), end) for start, (owner, end) in zip(starts, row.parts, strict=False)]

    def add(self, row: Tokens) -> int:
        for owner, first, end in self._new(row):
            if end > first:
                self.tokens += end - first
                self._ends[owner] = end
        return self.tokens

    def add_all(self, rows: Sequence[Held]) -> int:
        for held in rows:
            self.add(held.row)
        return self.tokens

    def fits(self, row: Tokens, budget: int) -> int:
        """How many of its first tokens can be added within a budget."""
        left, reach = budget - self.tokens, 0
        for _, first, end in self._new(row):
            new = max(0, end - first)
            if new > left:
                return first + left
            left, reach = left - new, end
        return reach

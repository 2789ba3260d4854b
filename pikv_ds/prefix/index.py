"""Which of many token sequences begins like a new one: blocks by their chained hashes, then the ids themselves. Pure: no cache, no rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

BLOCK = 16  # tokens; a shorter beginning is not worth a row of its own


class Match(NamedTuple):
    """Sequence `number` begins with the first `length` tokens that were asked for."""

    number: int
    length: int


class PrefixIndex:
    """Sequences by their numbers."""

    def __init__(self) -> None:
        self._held: dict[int, list[int]] = {}
        self._blocks: dict[int, set[int]] = {}
        """Hash of the first n blocks -> numbers of the sequences that have it."""

    def hold(self, number: int, tokens: Sequence[int]) -> None:
        """`tokens`, from the first on, can be found from now on as `number`."""
        self.forget(number)
        self._held[number] = list(tokens)
        for key in _keys(tokens):
            self._blocks.setdefault(key, set()).add(number)

    def forget(self, number: int) -> None:
        """It is not found any more; one that is not held is no error."""
        for key in _keys(self._held.pop(number, ())):
            holders = self._blocks[key]
            holders.discard(number)
            if not holders:
                del self._blocks[key]

    def match(self, tokens: Sequence[int]) -> Match | None:
        """The longest common beginning with any sequence, the latest number of several; None: there is none of a block or more.

        Ids are compared, so that two beginnings of one hash are not taken for each other.
        """
        tokens, levels = list(tokens), []
        for key in _keys(tokens):
            if key not in self._blocks:
                break
            levels.append(self._blocks[key])
        for depth in range(len(levels), 0, -1):  # what shares more than these blocks is among those that share them
            found = [Match(number, common(self._held[number], tokens)) for number in levels[depth - 1]]
            best = max(found, key=lambda one: (one.length, one.number))
            if best.length >= depth * BLOCK:
                return best
        return None

    def __len__(self) -> int:
        return len(self._held)


def _keys(tokens: Sequence[int]) -> Iterator[int]:
    """Hash of the first block, of the first two, ..."""
    key = 0
    for end in range(BLOCK, len(tokens) + 1, BLOCK):
        key = hash((key, *tokens[end - BLOCK : end]))
        yield key


def common(a: list[int], b: list[int]) -> int:
    """How many tokens both begin with."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:  # the first `low` are equal, the first `high` are not
        middle = (low + high) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle)
    return low

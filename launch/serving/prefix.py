"""Which request in the cache begins like a prompt: blocks of tokens by their chained hashes. Rank 0's own; entries stay where they are."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pikv_ds.cache.cache import PiKVCache

BLOCK = 16  # tokens


def why_not_shared(cache: PiKVCache) -> str | None:
    """Why no request may take over another's entries; None: it may. What was demoted, evicted or has left a window is not as it was."""
    config, plain = cache.config, {"compression": "none", "scheduling": "none"}
    for block, none in plain.items():
        method = getattr(config, block).method
        if method != none:
            return f'pikv.{block}.method is "{method}": entries of a request change while it grows'
    if config.pools:
        return "pikv.pools moves pages of a request while it grows"
    if any(layer.window is not None for layer in cache.layers):
        return "the model has sliding windows, which entries leave"
    return None


class Match(NamedTuple):
    """Request `source` on `rank` holds the first `keep` tokens."""

    source: int
    rank: int
    keep: int


class PrefixIndex:
    """Of requests that run, and of the last `parked` finished ones of each rank, the longest unused go first."""

    def __init__(self, parked: int) -> None:
        self.most_parked = parked
        self._blocks: dict[int, dict[int, int]] = {}
        """Hash of the first n blocks -> request -> its rank."""
        self._held: dict[int, tuple[int, list[int]]] = {}
        self._parked: OrderedDict[int, int] = OrderedDict()

    def hold(self, number: int, rank: int, tokens: Sequence[int]) -> None:
        """The cache holds `tokens` of a request, from its beginning."""
        self.forget(number)
        self._held[number] = (rank, list(tokens))
        for key, _ in _keys(tokens):
            self._blocks.setdefault(key, {})[number] = rank

    def park(self, number: int, rank: int) -> list[int]:
        """A request has finished; its entries stay. Returns requests whose entries should go in return."""
        if number not in self._held:
            return [number]
        self._parked[number] = rank
        mine = [one for one, its in self._parked.items() if its == rank]
        over = mine[: max(0, len(mine) - self.most_parked)]
        for one in over:
            self.forget(one)
        return over

    def parked_tokens(self, rank: int) -> int:
        """In the cache for finished requests of a rank."""
        return sum(len(self._held[number][1]) for number, its in self._parked.items() if its == rank)

    def release(self, rank: int, tokens: int) -> list[int]:
        """Parked requests of a rank, the longest unused first, that together hold at least so many; none is parked any more."""
        gone, freed = [], 0
        for number in [one for one, its in self._parked.items() if its == rank]:
            if freed >= tokens:
                break
            freed += len(self._held[number][1])
            gone.append(number)
            self.forget(number)
        return gone

    def match(self, prompt: Sequence[int]) -> Match | None:
        """The longest beginning of a prompt that is held. Its last token is always left to run: its logits are needed."""
        found = None
        for key, end in _keys(prompt[:-1]):
            holders = self._blocks.get(key)
            if not holders:
                break
            number, rank = next(reversed(holders.items()))
            found = Match(number, rank, end)
        if found is not None and found.source in self._parked:
            self._parked.move_to_end(found.source)
        return found

    def forget(self, number: int) -> None:
        self._parked.pop(number, None)
        for key, _ in _keys(self._held.pop(number, (0, []))[1]):
            holders = self._blocks.get(key, {})
            holders.pop(number, None)
            if not holders:
                self._blocks.pop(key, None)

    def __len__(self) -> int:
        return len(self._parked)


def _keys(tokens: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(hash of all blocks so far, tokens in them)."""
    key = 0
    for end in range(BLOCK, len(tokens) + 1, BLOCK):
        key = hash((key, tuple(tokens[end - BLOCK : end])))
        yield key, end

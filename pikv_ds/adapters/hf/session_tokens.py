"""Which tokens the rows of a session hold, so that a turn that does not continue them is refused before it is run."""

from __future__ import annotations

from torch import Tensor

from pikv_ds.errors import UnsupportedError
from pikv_ds.prefix.index import common
from pikv_ds.prefix.log import TokenLog, Tokens
from pikv_ds.prefix.store import Source

from .prefixes import Stored


class SessionTokens:
    """Of one conversation, in the place of Prefixes: nothing is looked up and nothing parked."""

    parks = False
    alone = "a session keeps track of its tokens"

    def __init__(self, name: str) -> None:
        self.name, self.log = name, TokenLog()
        self.clear()

    def clear(self) -> None:
        self.log.begin([])
        self.num_rows, self._begins = 0, True

    def begins(self) -> None:
        self._begins = True

    def find(self, ids: Tensor, mask: Tensor | None) -> tuple[int, list[Source]] | None:
        return None

    def plan(self, *, broken: bool) -> list[Source] | None:
        return None

    def continues(self, ids: Tensor, mask: Tensor | None) -> None:
        """ids [B, C], of the columns that are stored, padding where mask [B, C] is False. Sync: reads them.

        Raises: UnsupportedError where they are not the tokens that the rows hold; what is not known by its ids is not compared.
        """
        rows = self.held()
        if rows is None or len(rows) != len(ids):
            return
        self.log.settle(rows)  # so that the next turn reads its own tokens alone
        for number, (row, given) in enumerate(zip(rows, ids.tolist(), strict=True)):
            real = given if mask is None else [token for token, is_real in zip(given, mask[number].tolist(), strict=True) if is_real]
            if real != row.tokens[: len(real)]:  # the row is longer where a crop waits for the forward
                at = common(row.tokens, real)
                raise UnsupportedError(
                    f"session {self.name!r} holds {len(row.tokens)} tokens, and input_ids are others from token {at} on: it "
                    f"would answer to what it holds. Give the whole conversation, or call rewind(input_ids) to forget what differs"
                )

    def ran(self, num_rows: int, stored: Stored | None) -> None:
        if self._begins:
            self.log.begin([Tokens() for _ in range(num_rows)])
            self._begins = False
        self.num_rows = num_rows
        if stored is not None:
            if stored.tokens is None:
                self.log.known = False
            else:
                self.log.add(*stored)
        self.log.ran()

    def select(self, index: list[int]) -> None:
        self.log.select(index)

    def cropped(self, lens: list[int]) -> None:
        self.log.keep(lens)

    def held(self) -> list[Tokens] | None:
        return self.log.rows()

    def put(self, rows: list[Tokens] | None, num_rows: int) -> None:
        self.log.begin(rows or [Tokens() for _ in range(num_rows)])
        self.log.known, self.num_rows, self._begins = rows is not None, num_rows, False

    def stats(self) -> dict[str, float | int | None]:
        return {}

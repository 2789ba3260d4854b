"""What a rule is: one combination that is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from pikv_ds.errors import ConfigError

from .facts import Facts

LooksAt = Literal["block", "model"]


class Rule(NamedTuple):
    """The words are for tables; what an error says is made of the values given."""

    name: str
    """As ConfigError.rule carries it."""
    looks_at: LooksAt
    """The block alone, and then it is refused when it is read; or also layers, shards and ranks, and then when a cache is built."""
    blocks: tuple[str, ...]
    """The blocks of "pikv" that do not combine."""
    refuses: str
    why: str
    instead: str
    says: Callable[[Facts], str | None]
    """The error, or None where nothing is refused."""


def said(call: Callable[[], object]) -> str | None:
    """What `call` refuses with."""
    try:
        call()
    except ConfigError as error:
        return str(error)
    return None

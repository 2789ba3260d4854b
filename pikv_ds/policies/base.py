"""Retention policy (the paper's "scheduling"): which pages stay. R requests, P pages per request."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PageStats:
    """What a policy may look at, for one layer and shard."""

    seqlens: Tensor
    """[R, P] int32, entries in each page; 0 where a request has no such page."""
    last_position: Tensor
    """[R, P] int32, largest position in each page; -1 where there is no page."""


class RetentionPolicy(ABC):
    """Scores pages. The caller pins sink pages and the open page, then frees the lowest scores until the budget is met.

    Options of a policy are keyword-only constructor arguments with defaults.
    """

    name: ClassVar[str]
    keeps_all: ClassVar[bool] = False
    """True: score() is +inf throughout, so the cache need not ask."""

    @abstractmethod
    def score(self, stats: PageStats) -> Tensor:
        """-> f32 [R, P]; higher stays longer, +inf is never evicted."""

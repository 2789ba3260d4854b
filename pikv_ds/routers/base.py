"""KV router: which shards a query reads. T queries, S shards, R requests, Hq and Hkv heads, D key width."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor


class Router(ABC):
    """Chooses shards per query. The caller adds the query's own chunk, the sink tokens and the recent window.

    Options of a router are keyword-only constructor arguments with defaults.
    """

    name: ClassVar[str]
    reads_all: ClassVar[bool] = False
    """True: route() never leaves a shard out, so the cache need not ask."""

    @abstractmethod
    def route(self, q: Tensor, summary: Tensor) -> Tensor:
        """q [T, Hq, D], summary [S, R, Hkv, D] (a key-like vector per shard and request) -> bool [T, S], q's device."""

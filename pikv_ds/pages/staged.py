"""Far pages beside the near ones while they are read: which are there, which make room, what is on its way. Host tables, on the CPU.

G slots of staging, Q far pages. The page that was asked for longest ago makes room.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

import numpy as np

from .far import LayerTier

Fetch = Callable[[np.ndarray, np.ndarray], None]
"""(far pages [n], slots of staging [n]): brings their records there."""


class Staged:
    """Owns who lies in which slot; the memory is the pool's. Not for two threads: reads run in one, tables change in the other."""

    def __init__(self, tier: LayerTier, fetch: Fetch) -> None:
        self.num_slots, self._thread, self._fetch = tier.num_staged, tier.thread, fetch
        self.slot = np.full(0, -1, dtype=np.int32)
        """[Q] where a far page is staged, -1 = nowhere."""
        self.held = np.full(self.num_slots, -1, dtype=np.int64)
        """[G] which far page a slot has, -1 = none."""
        self._asked = np.zeros(self.num_slots, dtype=np.int64)
        self._clock = 0
        self._coming: tuple[Future, np.ndarray] | None = None
        self.wanted = self.fetched = self.ahead = self.used_ahead = 0
        """Far pages that were asked for; those of them that had to be fetched; those fetched before anybody asked; and of these, used."""
        self._unasked = np.zeros(self.num_slots, dtype=bool)

    def widen(self, num_far: int) -> None:
        """There are ids for so many far pages."""
        self.slot = np.concatenate([self.slot, np.full(num_far - len(self.slot), -1, dtype=np.int32)])

    def drop(self, far: np.ndarray) -> None:
        """These far pages are no more."""
        self.wait()
        slots = self.slot[far]
        self.slot[far] = -1
        self._empty(slots[slots >= 0])

    def bring(self, far: np.ndarray, *, wait: bool = True, ahead: bool = False) -> None:
        """Far pages [n], each once and at most G, are staged, once `wait` has been called.

        ahead: nobody has asked for them yet, so they count as the least wanted. Raises: what the store raises.
        """
        assert len(far) <= self.num_slots, f"{len(far)} pages at once, staging has {self.num_slots} slots"
        self.wait()
        self._clock += 1
        slots = self.slot[far]
        missing = far[slots < 0]
        there = slots[slots >= 0]
        self._asked[there] = self._clock
        if not ahead:
            self.wanted += len(far)
            self.used_ahead += int(self._unasked[there].sum())
            self._unasked[there] = False
        if not len(missing):
            return
        places = np.argpartition(self._asked, len(missing) - 1)[: len(missing)]
        gone = self.held[places]
        self.slot[gone[gone >= 0]] = -1
        self.held[places], self.slot[missing], self._asked[places] = missing, places, self._clock
        self._unasked[places] = ahead
        if ahead:
            self.ahead += len(missing)
        else:
            self.fetched += len(missing)
        if self._thread is None or wait:
            try:
                self._fetch(missing, places)
            except BaseException:
                self._forget(missing, places)
                raise
        else:
            self._coming = self._thread.submit(self._fetch, missing, places), missing

    def wait(self) -> None:
        """What is on its way is there. Raises: what the store has raised; what was on its way is not staged then."""
        if self._coming is None:
            return
        (future, far), self._coming = self._coming, None
        try:
            future.result()
        except BaseException:
            self._forget(far, self.slot[far])
            raise

    def _forget(self, far: np.ndarray, places: np.ndarray) -> None:
        self.slot[far] = -1
        self._empty(places)

    def _empty(self, places: np.ndarray) -> None:
        self.held[places], self._asked[places], self._unasked[places] = -1, 0, False

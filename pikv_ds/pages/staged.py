"""Far pages beside the near ones while they are read: which are there, which make room, what is on its way. Host tables, on the CPU.

G slots of staging, Q far pages. The page that was asked for longest ago makes room.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import wait as wait_for

import numpy as np

from .far import LayerTier

Fetch = Callable[[np.ndarray, np.ndarray], None]
"""(far pages [n], slots of staging [n]): brings their records there."""


class Staged:
    """Owns who lies in which slot; the memory is the pool's. What is on its way is waited for before tables change."""

    def __init__(self, tier: LayerTier, fetch: Fetch) -> None:
        self.num_slots, self._thread, self._fetch = tier.num_staged, tier.thread, fetch
        self.slot = np.full(0, -1, dtype=np.int32)
        """[Q] where a far page is staged, -1 = nowhere."""
        self.held = np.full(self.num_slots, -1, dtype=np.int64)
        """[G] which far page a slot has, -1 = none."""
        self._asked = np.zeros(self.num_slots, dtype=np.int64)
        self._clock = 0
        self._coming: Future | None = None
        self.wanted = self.fetched = self.ahead = self.used_ahead = 0
        """Far pages that were asked for; those of them that had to be fetched; those fetched before anybody asked; and of these, used."""
        self._ahead = np.zeros(self.num_slots, dtype=bool)

    def widen(self, num_far: int) -> None:
        """There are ids for so many far pages."""
        self.slot = np.concatenate([self.slot, np.full(num_far - len(self.slot), -1, dtype=np.int32)])

    def drop(self, far: np.ndarray) -> None:
        """These far pages are no more."""
        self.wait()
        slots = self.slot[far]
        self.slot[far] = -1
        self._empty(slots[slots >= 0])

    def bring(self, far: np.ndarray, *, wait: bool = True) -> None:
        """Far pages [n], each once and at most G, are staged; with wait False once `wait` has been called.

        Raises: what the store raises.
        """
        assert len(far) <= self.num_slots, f"{len(far)} pages at once, staging has {self.num_slots} slots"
        self.wait()
        self._clock += 1
        there = self.slot[far]
        there = there[there >= 0]
        self._asked[there] = self._clock
        self.wanted += len(far)
        self.used_ahead += int(self._ahead[there].sum())
        self._ahead[there] = False
        missing, places = self._places(far, self._clock)
        self.fetched += len(missing)
        if self._thread is None or wait:
            self._read(missing, places)
        else:
            self._coming = self._thread.submit(self._read, missing, places)

    def foresee(self, pick: Callable[[int], np.ndarray]) -> None:
        """Far pages that may be asked for next, pick(m) [n <= m], are staged while the caller reads those of the last `bring`, whose slots
        stay. An error waits for the next call."""
        assert self._thread is not None, "nothing is fetched ahead without a thread"
        self.wait()
        self._coming = self._thread.submit(self._read_ahead, pick)

    def _read_ahead(self, pick: Callable[[int], np.ndarray]) -> None:
        missing, places = self._places(pick(int((self._asked < self._clock).sum())), self._clock - 1)
        self._ahead[places] = True
        self.ahead += len(missing)
        self._read(missing, places)

    def _places(self, far: np.ndarray, asked: int) -> tuple[np.ndarray, np.ndarray]:
        """Those of `far` that are not staged, and slots for them, which they have from now on."""
        missing = far[self.slot[far] < 0]
        places = np.argsort(self._asked, kind="stable")[: len(missing)]
        gone = self.held[places]
        self.slot[gone[gone >= 0]] = -1
        self.held[places], self.slot[missing], self._asked[places], self._ahead[places] = missing, places, asked, False
        return missing, places

    def _read(self, far: np.ndarray, places: np.ndarray) -> None:
        if not len(far):
            return
        try:
            self._fetch(far, places)
        except BaseException:  # nobody may read what has come of it
            self.slot[far] = -1
            self._empty(places)
            raise

    def wait(self) -> None:
        """What is on its way is there. Raises: what the store has raised; what was on its way is not staged then."""
        if self._coming is not None:
            coming, self._coming = self._coming, None
            coming.result()

    def close(self) -> None:
        """Nobody asks any more: what is on its way has come to its end, whichever that is."""
        if self._coming is not None:
            wait_for([self._coming])
            self._coming = None

    def _empty(self, places: np.ndarray) -> None:
        self.held[places], self._asked[places], self._ahead[places] = -1, 0, False

"""Far pages beside the near ones while they are read: which are there, which make room, what is on its way. Host tables, on the CPU.

X sections of a record: 1, or its heads where every head reads pages of its own; then each has the slots of staging for itself, and only
what heads read comes. G slots, Q far pages. The page that was asked for longest ago makes room.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import wait as wait_for

import numpy as np
import torch
from torch import Tensor

from pikv_ds import ops

from .far import LayerTier

Fetch = Callable[[Tensor, int], None]
"""(coming [n, 3] int64 of (far page, slot of staging, section), X): brings the bytes there."""


class Staged:
    """Owns who lies in which slot; the memory is the pool's. What is on its way is waited for before tables change.

    `wanted`, `fetched`, `ahead`, `used_ahead`: far pages that were asked for; those of them that had to be fetched; those fetched before
    anybody asked; and of these, used. Where heads read pages of their own, every head's counts for itself.
    """

    def __init__(self, tier: LayerTier, fetch: Fetch) -> None:
        self.num_slots, self._thread, self._fetch = tier.num_staged, tier.thread, fetch
        self._num_near, self._first_far = tier.num_near, tier.num_near + tier.num_staged
        self._clock = 0
        self._coming: Future | None = None
        self.wanted = self.fetched = self.ahead = self.used_ahead = 0
        self._begin(1, 0)

    def _begin(self, sections: int, num_far: int) -> None:
        held = torch.full((sections, self.num_slots), -1)
        slot = torch.full((sections, num_far), -1, dtype=torch.int32)
        self._tables = ops.Staging(slot, held, torch.zeros_like(held), torch.zeros_like(held, dtype=torch.bool))

    @property
    def sections(self) -> int:
        """X, as it is now."""
        return self._tables.slot.shape[0]

    @property
    def slot(self) -> np.ndarray:
        """[X, Q] int32 where sections of a far page are staged, -1 = nowhere."""
        return self._tables.slot.numpy()

    @property
    def held(self) -> np.ndarray:
        """[X, G] int64 which far page a slot has, -1 = none."""
        return self._tables.held.numpy()

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self._tables)

    def widen(self, num_far: int) -> None:
        """There are ids for so many far pages."""
        added = num_far - self._tables.slot.shape[1]
        self._tables = self._tables._replace(slot=torch.nn.functional.pad(self._tables.slot, (0, added), value=-1))

    def divide(self, sections: int) -> None:
        """Records come by so many sections from now on; where that is another number nothing is staged any more."""
        if sections != self.sections:
            self.forget(sections)

    def forget(self, sections: int | None = None) -> None:
        """Nothing is staged."""
        self.wait()
        self._begin(sections or self.sections, self._tables.slot.shape[1])

    def drop(self, far: Tensor) -> None:
        """These far pages [n] int64 are no more."""
        self.wait()
        section, at = torch.nonzero(self._tables.slot[:, far] >= 0, as_tuple=True)
        self._take_back(torch.stack([far[at], self._tables.slot[section, far[at]].long(), section], 1))

    def serve(self, block_table: Tensor, page_list: Tensor, *, wait: bool = True) -> ops.Staged:
        """Listed pages are staged, as many as staging holds; the rest is `left` (None: nothing). With wait False once `wait` has been
        called. Arguments as of ops.stage.

        Raises: what the store raises.
        """
        self.wait()
        self._clock += 1
        found = ops.stage(block_table, page_list, self._tables, first_far=self._first_far, num_near=self._num_near, clock=self._clock)
        num, wanted, used_ahead, left = found.counts.tolist()
        self.wanted += wanted
        self.used_ahead += used_ahead
        self.fetched += num
        if num and (self._thread is None or wait):
            self._read(found.coming[:num])
        elif num:
            self._coming = self._thread.submit(self._read, found.coming[:num])
        return found if left else found._replace(listed=page_list, left=None)

    def bring(self, far: np.ndarray, *, wait: bool = True) -> None:
        """Far pages [n], each once and at most G, are staged whole; with wait False once `wait` has been called.

        Raises: what the store raises.
        """
        assert len(far) <= self.num_slots, f"{len(far)} pages at once, staging has {self.num_slots} slots"
        self.divide(1)
        ids = torch.from_numpy(far.astype(np.int32) + self._first_far).view(1, 1, -1)
        self.serve(ids, torch.arange(len(far), dtype=torch.int32).view(1, 1, -1), wait=wait)

    def foresee(self, score: Tensor, hidden: Tensor, block_table: Tensor, most: int) -> None:
        """Far pages that score best of those that are not here, `most` of a section, are fetched while the caller reads those of the last
        `serve`, whose slots stay. An error waits for the next call. Arguments as of ops.stage_ahead; nobody may change them."""
        assert self._thread is not None, "nothing is fetched ahead without a thread"
        self.wait()
        self._coming = self._thread.submit(self._read_ahead, score, hidden, block_table, most)

    def _read_ahead(self, score: Tensor, hidden: Tensor, block_table: Tensor, most: int) -> None:
        coming, count = ops.stage_ahead(score, hidden, block_table, self._tables, first_far=self._first_far, clock=self._clock, most=most)
        num = int(count)
        self.ahead += num
        self._read(coming[:num])

    def _read(self, coming: Tensor) -> None:
        try:
            self._fetch(coming, self.sections)
        except BaseException:  # nobody may read what has come of it
            self._take_back(coming)
            raise

    def _take_back(self, coming: Tensor) -> None:
        """What [n, 3] says is staged no more."""
        (far, at, section), (slot, held, asked, ahead) = coming.unbind(1), self._tables
        slot[section, far] = -1
        held[section, at], asked[section, at], ahead[section, at] = -1, 0, False

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

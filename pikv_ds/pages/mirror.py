"""Sizes of a rank's pages as its host knows them: what plans the next forward. L layers, R rows, S * H tables of a row."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pikv_ds.staging import Arriving


class Mirror:
    """The sizes of one moment. They are copied when it is made and waited for when they are asked for; on the CPU they are the sizes
    themselves, without a copy."""

    def __init__(self, counts: Tensor, free_tops: Sequence[Tensor], load: Tensor, counted: Tensor) -> None:
        """counts [L, R, S * H] of the nearest pools; free_tops: per level [L]; load [L, shards]; counted: as Counters.device_counts.
        Sync: none."""
        self._sizes = Arriving(counts, load, counted, *free_tops)

    @property
    def on_host(self) -> bool:
        """Nobody has to wait for them."""
        return self._sizes.on_host

    @property
    def arrived(self) -> bool:
        """Somebody has looked at them."""
        return self._sizes.arrived

    # Sync: each waits for the copy, once for all of them.

    @property
    def counts(self) -> Tensor:
        return self._sizes.values[0]

    @property
    def load(self) -> Tensor:
        return self._sizes.values[1]

    @property
    def spilled(self) -> int:
        """Entries that any rank has spilled so far."""
        return int(self._sizes.values[2][2])

    def free(self, level: int) -> Tensor:
        """[L] free pages. What is written here is known from then on."""
        return self._sizes.values[3 + level]

    def follow(self, num_new: Tensor, page_size: int) -> None:
        """A decode step has stored num_new [R] tokens, 0 or 1 of each row, in all tables of the row, and nothing has left: what is known is
        brought up to date without asking the device. For copies; where there is none they are up to date."""
        counts = self.counts
        opened = (counts % page_size == 0) & (num_new > 0).unsqueeze(-1)
        self.free(0).sub_(opened.sum((1, 2)))
        counts.add_(num_new.unsqueeze(-1))

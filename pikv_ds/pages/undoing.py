"""What rows count of tokens that a crop may take back waits until it is known; what has been counted can't be taken back. Host phase.

Counters of attention and what routers learn of entries have no inverse. So in a forward whose crop is announced the last WAITING tokens of
a row are counted at the start of the next forward, those that stayed, and a crop behind what has been counted is refused. R rows.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from pikv_ds.staging import sent
from pikv_ds.step.step import Step

from .rows import RowChange, Rows, least

WAITING = 64  # tokens of a row; more than anybody drafts for one forward


def held_nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that these keep alive, of storages that they share once."""
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


class Undoing:
    """Owns, per row, how many tokens have been counted for good."""

    def __init__(self, rows: Rows, name: str, who: str) -> None:
        """name: of the column. who: what counts, as a user knows it."""
        self.rows, self.who = rows, who
        self.counted = rows.ints(f"{name}.counted", least)
        rows.limit(self.check)

    def note(self, step: Step, waits: list[bool]) -> None:
        """A forward ends. waits [R]: its last tokens have not been counted yet."""
        if step.hold and not step.tentative:
            return  # a rehearsal: what it counted is meant to stay when its tokens go
        lens = zip(step.lens_before_host, step.lens_after_host, waits, self.counted.values, strict=True)
        self.counted.values = [max(at, before, after - WAITING) if later else after for before, after, later, at in lens]

    def check(self, change: RowChange) -> None:
        """Raises: RuntimeError for a crop of what has been counted, on all ranks alike."""
        rows = [(p, n) for p, n in zip(change.parent, change.keep, strict=True) if p >= 0]
        for parent, keep in rows:
            if 0 < keep < self.counted.values[parent]:
                raise RuntimeError(
                    f"crop to {keep} of {change.lens[parent]} tokens: {self.who} has counted tokens up to {self.counted.values[parent]}, "
                    f"and a request of {keep} tokens would not have; announce crops before the one forward that they undo "
                    f"(cache.activate_past_recording(), as assisted generation does), at most {WAITING} tokens of it"
                )
        if len({p for p, _ in rows}) < len(set(rows)):
            raise RuntimeError(
                f"rows that continue one row are cropped to different lengths, {sorted(set(rows))} (row, tokens): {self.who} counts what "
                f"stays of the last forward once; fork in one forward and crop in another"
            )

    def kept(self, change: RowChange | None, lens: list[int]) -> Tensor:
        """[R] int64, how many tokens rows of these lengths go on with; change None: with all."""
        keep = list(lens)
        for parent, n in zip(change.parent, change.keep, strict=True) if change is not None else ():
            if parent >= 0:
                keep[parent] = n
        return sent(keep, torch.int64, self.rows.device)

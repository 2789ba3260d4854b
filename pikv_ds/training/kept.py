"""Windows that are recorded when they are asked for, the latest of them kept; also where all ranks must run the model together."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from .recorded import Window


class KeptWindows:
    """`Windows` of recorded.py over a function that records one."""

    def __init__(
        self, record: Callable[[int], Window], count: int, *, keep_bytes: int = 1 << 30, any_rank: Callable[[bool], bool] | None = None
    ) -> None:
        """keep_bytes: of windows that are kept. any_rank: whether it is so on any rank, a collective; None: each records alone.

        With any_rank, ranks ask for as many windows, in step, as pikv_ds/training/fit.py does: those that have theirs record it again
        where another must, as experts on several ranks answer to all of them.
        """
        self._record, self._count, self.keep_bytes, self._any_rank = record, count, keep_bytes, any_rank
        self._kept: OrderedDict[int, Window] = OrderedDict()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Window:
        needed = index not in self._kept
        if self._any_rank is not None:
            needed = self._any_rank(needed)
        if not needed:
            self._kept.move_to_end(index)
            return self._kept[index]
        window = self._kept[index] = self._record(index)
        self._kept.move_to_end(index)
        size = sum(x.nbytes for layer in window.layers for x in (layer.q, layer.k, layer.v, layer.hidden))
        while len(self._kept) > 1 and len(self._kept) * size > self.keep_bytes:
            self._kept.popitem(last=False)
        return window

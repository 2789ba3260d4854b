"""Which forwards a batch of (context, continuation) pairs is fed in, so that what is scored reads its context from the store."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pikv_ds.errors import UnsupportedError

Ids = list[int]


class Continuations:
    """The first scored column of each request, the last of its context, found again in the padded rows that lm-eval makes of them.

    Attention inside a forward is on raw keys and values. A forward that begins at each of these columns makes whatever is scored read
    its context from the store, however short that is.
    """

    def __init__(self, requests: Sequence[tuple[object, Ids, Ids]] = (), max_length: int = 0) -> None:
        """requests: (anything, context, continuation); of contexts that are too long the beginning is cut off, as lm-eval does.

        Raises: UnsupportedError for a continuation that leaves no token for a context.
        """
        self._starts: dict[tuple[int, ...], set[int]] = {}
        for _, context, continuation in requests:
            if len(continuation) > max_length:
                raise UnsupportedError(
                    f"a continuation of {len(continuation)} tokens leaves no room for a context in {max_length} tokens (max_length)"
                )
            fed = (context + continuation)[-(max_length + 1) :][:-1]
            self._starts.setdefault(tuple(fed), set()).add(len(fed) - len(continuation))
        self._lengths = sorted({len(fed) for fed in self._starts})

    def forwards(self, rows: Tensor, chunk: int) -> list[int]:
        """Columns of each forward over rows [B, T] int64, padded with zeros on the right: at most `chunk`. Sync: reads the rows."""
        columns = rows.shape[1]
        starts = {0, columns}.union(*(self._starts_in(row) for row in rows.tolist())) if self._starts else {0, columns}
        edges = sorted(start for start in starts if start <= columns)
        cuts = [cut for start, end in zip(edges, edges[1:], strict=False) for cut in range(start, end, chunk)] + [columns]
        return [end - start for start, end in zip(cuts, cuts[1:], strict=False)]

    def first_scored(self, rows: Tensor) -> int:
        """The first column of rows [B, T] whose logits are asked for; 0 where that is not known. Sync: reads the rows."""
        found = [self._starts_in(row) for row in rows.tolist()] if self._starts else []
        return min((min(starts, default=0) for starts in found), default=0)

    def _starts_in(self, row: Ids) -> set[int]:
        """Token 0 may be a real one, so a row can be what several requests look like when padded: the starts of all of them."""
        end = max((at + 1 for at, token in enumerate(row) if token), default=0)
        found = [self._starts.get(tuple(row[:length]), set()) for length in self._lengths if end <= length <= len(row)]
        return set().union(*found)

"""Rows of tokens to the ranks that need them, one message for each, and the partial results that come back.

G ranks, K groups of rows (queries, entries), N tokens of a rank. A message is a header of 16 bytes with the rows of each group, a section
for each field that every rank gets, and for every group its tokens, int32, and its fields. Sections start on multiples of 16 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .library import OPS
from .reference.route import sections


def route_bytes(common: Sequence[int], groups: Sequence[tuple[int, Sequence[int]]], num_tokens: int) -> int:
    """Bytes of a message: `common` = bytes of a row of each field that every rank gets, num_tokens rows each; groups = (rows, bytes of a
    row of each field)."""
    return sections([num_tokens, *(rows for rows, _ in groups)], [list(common), *([4, *widths] for _, widths in groups)])[1]


def route_pack(buffer: Tensor, need: Tensor, fields: Sequence[Tensor], *, groups: Sequence[int], own: int, dense: bool) -> Tensor:
    """Write a message for every rank, in place.

    Args:
        buffer: uint8 [G, most], contiguous, changed; most holds N rows of every group.
        need: bool [K, G, N]: the rows of each group that a rank gets.
        fields: [n, ...] each, n <= N, contiguous; floats or integers. Rows n ... N - 1 of what every rank gets are -1.
        groups: of each field, ascending; -1 = every rank gets all rows.
        own: the rank whose message takes `most` bytes all the same.
        dense: a message has the rows that its rank needs, and messages lie one after another. Else it has room for N rows of each group,
            at the places of their tokens (rows that are not needed hold anything, their tokens -1), and every message takes `most` bytes.

    Returns: [G] int64, the bytes that each message takes. Sync: none in compiled versions. CUDA: not dense only.
    """
    return OPS.route_pack(buffer, need, fields, groups, own, dense)


def route_unpack(buffer: Tensor, fields: Sequence[Tensor], tokens: Tensor, counts: Tensor, *, groups: Sequence[int], dense: bool) -> None:
    """The inverse: the rows that all ranks have sent to this one, in the order of ranks and tokens, in place.

    Args:
        buffer: uint8 [G, most], the message of rank g from row g on.
        fields: [G * N, ...] each, changed; those of group -1 have all rows, others as many as were sent; the rest is left alone.
        tokens: int32 [K, G * N], changed: g * N + the token of each row, -1 behind them. counts: int32 [K, G], changed: rows of each rank.
        dense: as in route_pack; else row g * N + t is that of token t of rank g, where its token is not -1, and counts are N.

    Raises: RuntimeError: a header names more rows than there are tokens. Sync: none in compiled versions. CUDA: not dense only.
    """
    OPS.route_unpack(buffer, fields, tokens, counts, groups, dense)


def route_merge(partials: Tensor, need: Tensor, *, order: Sequence[int], dense: bool) -> tuple[Tensor, Tensor]:
    """Merge partial attention that came back: as `merge`, over the ranks that were asked.

    Args:
        partials: f32 [M, H, D + 1], out and lse. dense: a row for each True of `need`, in its order; else row g * N + t.
        need: bool [G, N]. order: the ranks in the order of the sum.

    Returns: out [N, H, D] f32 and lse [N, H] f32; 0 and -inf where nobody was asked. The bits of `merge` with 0 and -inf for the others.
    Sync: none in compiled versions.
    """
    return OPS.route_merge(partials, need, order, dense)

"""The plan of one forward: whose tokens are in it, how long every request is before and after. Host side, once per forward."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(slots=True, kw_only=True)
class LocalStep:
    """What this rank brings to a forward. B request rows, T token columns.

    num_new: real (not padding) tokens per row; parent and keep: which earlier row each row continues and up to which position
    (parent -1 = a new request). positions: [B, T] int32 on the device, -1 = padding.
    """

    num_rows: int
    num_columns: int
    num_new: list[int]
    parent: list[int]
    keep: list[int]
    positions: Tensor
    digest: int
    identity: bool  # rows continue themselves, nothing cropped
    fresh: bool  # all rows are new requests

    @property
    def idle(self) -> bool:
        """No token of this forward is stored: a finished rank, or one without requests, that only keeps step."""
        return not any(self.num_new)

    @property
    def plain_decode(self) -> bool:
        """One stored token per row, or none at all, and the rows unchanged: nothing that other ranks need to be told."""
        return self.num_columns == 1 and self.identity and (self.idle or all(self.num_new))


@dataclass(frozen=True, slots=True)
class Source:
    """The tokens one rank brings: B rows of T columns; its rows are row0 .. row0 + B - 1 of the tables."""

    num_rows: int
    num_columns: int
    row0: int

    @property
    def num_tokens(self) -> int:
        return self.num_rows * self.num_columns


@dataclass(slots=True, kw_only=True)
class StepPlan:
    """What all ranks agreed on for one forward. R rows in all, N tokens per source after padding to the largest.

    Device tensors: rows [sources * N] int64 ascending; lens_before, lens_after [R] int64; one_column [R] bool, rows whose source has T == 1.
    """

    sources: list[Source]
    own: int  # index of this rank's source
    lens_before_host: list[int]
    lens_after_host: list[int]
    num_tokens: int
    rows: Tensor
    lens_before: Tensor
    lens_after: Tensor
    one_column: Tensor
    positions: Tensor | None = None  # [sources * N] int32, -1 = padding; from the first record of the forward
    valid: Tensor | None = None
    capacity: list[int] = field(default_factory=list)  # per layer
    may_spill: list[bool] = field(default_factory=list)
    read_pages: list[int] = field(default_factory=list)  # per layer, block table columns that hold entries

    @property
    def num_rows(self) -> int:
        return len(self.lens_after_host)

    @property
    def decode(self) -> bool:
        """Every source has one column: no row has two tokens."""
        return all(s.num_columns == 1 for s in self.sources)

    def has_past(self, source: Source) -> bool:
        return any(self.lens_before_host[source.row0 : source.row0 + source.num_rows])

    def set_positions(self, positions: Tensor) -> None:
        self.positions = positions
        self.valid = positions >= 0


def make_plan(shapes: list[tuple[int, int]], own: int, before: list[int], after: list[int], device: torch.device) -> StepPlan:
    """shapes: (B, T) per source; before, after: tokens of every row, in source order."""
    sources, row0 = [], 0
    for num_rows, num_columns in shapes:
        sources.append(Source(num_rows, num_columns, row0))
        row0 += num_rows
    num_tokens = max(s.num_tokens for s in sources)
    token = torch.arange(num_tokens)
    rows = torch.cat([s.row0 + (token // s.num_columns).clamp_max(s.num_rows - 1) for s in sources])
    one_column = [s.num_columns == 1 for s in sources for _ in range(s.num_rows)]
    return StepPlan(
        sources=sources,
        own=own,
        lens_before_host=before,
        lens_after_host=after,
        num_tokens=num_tokens,
        rows=rows.to(device),
        lens_before=torch.tensor(before, dtype=torch.int64).to(device),
        lens_after=torch.tensor(after, dtype=torch.int64).to(device),
        one_column=torch.tensor(one_column).to(device),
    )

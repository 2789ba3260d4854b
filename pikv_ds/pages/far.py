"""What a pool of pages in two tiers is given: how much of it is near, and where records lie that no op is given."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

from pikv_ds import ops


class FarStore(Protocol):
    """Records of one layer apart from its pool: host memory, a file, or both. A slot is where a record lies, an int64 of the store's own.

    A record is written once and read any number of times until its slot is released. Calls come from one thread at a time.
    """

    def write(self, records: Tensor, ids: Tensor) -> Tensor:
        """Keep a copy of records [n, record_bytes] uint8 at ids [m] int64: [m] int64 slots.

        Raises: CapacityError where it is full, and then nothing is kept.
        """

    def read(self, slots: Tensor, out: Tensor, ids: Tensor) -> None:
        """Records of slots [m] int64 into out [n, record_bytes] uint8 at ids [m] int64.

        Raises: PageFileError where what is read is not what was written; out is then not to be used.
        """

    def read_sections(self, slots: Tensor, coming: Tensor, out: Tensor, first: int, section_bytes: int) -> None:
        """Parts of records: coming [n, 3] int64 of (page, row, section), slots [Q] int64 of all pages. Section s, bytes s * section_bytes
        and so many on, of the record in slots[page] goes to the same place of out[first + row].

        Raises: as `read`.
        """

    def release(self, slots: Tensor) -> None:
        """Slots [m] int64 may be written again."""

    def clear(self) -> None:
        """Nothing is kept."""

    @property
    def num_pages(self) -> int:
        """Records that are kept."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory that are allocated for them."""


class TierSizes(NamedTuple):
    """Pages of every layer with full attention on a rank."""

    num_near: int
    num_staged: int
    num_host: int
    num_file: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTier:
    """Of one layer on one rank."""

    num_near: int
    """Pages in the pool's own memory: entries are appended there."""
    num_staged: int
    """Pages from the store that may lie beside them at once, to be read."""
    store: FarStore
    thread: Executor | None
    """Reads the store while something else is computed; None: reads happen where they are asked for."""
    score: Callable[..., Tensor] | None
    """As RetentionPolicy.score, of near pages: the lowest go first; None: the oldest."""
    sink_tokens: int
    recent_tokens: int
    """Pages with the first and the latest tokens of a request go last."""
    by_scores: bool
    """Stage what a router scores next best after a forward's choice, before it is asked for."""


class Staging(Protocol):
    """Far pages beside the near ones, as a reader needs it (staged.py)."""

    num_slots: int

    @property
    def slot(self) -> np.ndarray: ...

    def divide(self, sections: int) -> None: ...

    def serve(self, block_table: Tensor, page_list: Tensor) -> ops.Staged: ...

    def bring(self, far: np.ndarray, *, wait: bool = True) -> None: ...

    def foresee(self, score: Tensor, hidden: Tensor, block_table: Tensor, most: int) -> None: ...

    def wait(self) -> None: ...


class FarIds(Protocol):
    """As near_ids.py has them."""

    first_far: int

    @property
    def num_far(self) -> int: ...


class TwoTiers(Protocol):
    """A pool in two tiers, as its reader needs it (tiered.py)."""

    tier: LayerTier
    staged: Staging
    allocator: FarIds
    fmt: ops.PageFormat
    page_size: int

    @property
    def num_far(self) -> int: ...

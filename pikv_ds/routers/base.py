"""KV router: which of the stored pages a query reads.

Q queries, S local shards, N = Q * S block tables (those of query i are i * S ... i * S + S - 1), C table columns, Hq query heads and H kv
heads, D key width, P entries per page.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from pikv_ds.store import LayerStore


@dataclass(frozen=True, slots=True, kw_only=True)
class PageQuery:
    """Queries of one layer and the pages of this rank that they could read."""

    layer: int
    q: Tensor
    """[Q, Hq, D], contiguous."""
    positions: Tensor
    """[Q] int32; -1 = padding, whose choice does not matter."""
    store: LayerStore
    block_table: Tensor
    """[N, 1, C] int32."""
    seqlens: Tensor
    """[N, 1] int32, entries of each table that the query sees."""
    tail: Tensor | None
    tail_rows: Tensor | None
    """Raw keys of the open groups and [N] int32, as `ops.decode` takes them."""
    visible: Tensor
    """[Q, S, C] bool: the page holds an entry inside the query's window."""
    first: Tensor
    last: Tensor
    """[Q, S, C] int32: positions of the page's first and last entry; anything where not visible."""
    shard_begin: int
    """Global id of local shard 0."""
    scale: float
    total: Callable[[Tensor], Tensor]
    """lse [Q, Hq] f32 over this rank's pages -> over those of all ranks. A collective when there are several: call it on all or none."""


class Router(ABC):
    """Scores pages. The caller adds the pinned pages (sink tokens, recent window) and takes the best up to the budget, over all ranks.

    Options of a router are keyword-only constructor arguments with defaults; they are keys of the "routing" block. What a router keeps per
    page is a summary of the store (`open`), brought up to date after every append (`wrote`). A score must depend on the stored entries and
    the query alone, never on the number of ranks.
    """

    name: ClassVar[str]
    reads_all: ClassVar[bool] = False
    """True: nothing is ever left out, so the cache does not ask."""

    def open(self, layer: int, store: LayerStore) -> None:  # noqa: B027
        """A new, empty store of a layer: add the summaries. Host phase."""

    def wrote(self, layer: int, store: LayerStore, slot_mapping: Tensor, tail_rows: Tensor) -> None:  # noqa: B027
        """Entries were appended: slot_mapping [N] int32 (-1 = not stored here), tail_rows [N] int32, as the `append` call had them.

        Entries of a forward of several tokens are reported after its queries have been answered, since those must not see them.
        """

    @abstractmethod
    def score(self, asked: PageQuery) -> Tensor:
        """-> f32 [N, 1 or H, C], the higher the sooner read; not read where the page is not visible. Sync: none."""

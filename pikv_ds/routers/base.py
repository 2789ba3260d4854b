"""KV router: which of the stored pages a query reads.

Q queries, S local shards, N = Q * S block tables (those of query i are i * S ... i * S + S - 1), C table columns, Hq query heads and H kv
heads, D key width, P entries per page.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pikv_ds.codecs.part_file import PartFile
from pikv_ds.moved import moved
from pikv_ds.pages.events import NewEntries, PageChange
from pikv_ds.pages.pool import PagePool
from pikv_ds.pages.rows import Rows
from pikv_ds.pages.view import PageView
from pikv_ds.placement.shard_map import ShardMap
from pikv_ds.spec import LayerSpec

from .memory import Asked, Memory


@dataclass(frozen=True, slots=True, kw_only=True)
class PageQuery:
    """Queries of one layer and the pages of this rank that they could read."""

    layer: int
    rows: slice
    """The request rows, each with Q / R queries, in order."""
    q: Tensor
    """[Q, Hq, D], contiguous."""
    positions: Tensor
    """[Q] int32; -1 = padding, whose choice does not matter."""
    pool: PagePool
    block_table: Tensor
    """[N, 1, C] int32. Where blocks of pages are chosen, columns are blocks, here and below: page * blocks + block (pages/pool.py)."""
    seqlens: Tensor
    """[N, 1] int32, entries of each table that the query sees."""
    tail: Tensor | None
    tail_rows: Tensor | None
    """Raw keys of the open groups and [N] int32, as `ops.decode` takes them."""
    visible: Tensor
    hidden: Tensor
    """[Q, S, C] bool: the page holds an entry inside the query's window, or does not."""
    first: Tensor
    last: Tensor
    """[Q, S, C] int32: positions of the page's first and last entry; anything where not visible."""
    entries: Tensor
    """[Q, S, C] int32: entries of each page, 0 where not visible."""
    pinned: Tensor
    """[Q, S, C] bool: holds a sink or recent token, and is read if visible, whatever its score."""
    map: ShardMap
    """Which shards are local, and in which order a gather brings those of all ranks."""
    homes: Tensor | None
    """[R, L] int16: global shard of every position of the rows; None = there is one shard."""
    window: int | None
    scale: float
    gather: Callable[[Tensor], Tensor]
    """[...] of the same shape on all ranks -> [ranks, ...]. A collective when there are several: call it on all or none."""

    near_lse: Tensor | None = None
    """[Q, Hq] f32 lse of the entries of this rank that every query reads besides these pages (tiers/window.py); None = there are none."""

    page_table: Tensor | None = None
    """[N, 1, pages] int32, the pages themselves; None = block_table has them."""

    @property
    def view(self) -> PageView:
        """The tables, as readers take them."""
        return PageView(self.block_table if self.page_table is None else self.page_table, self.seqlens, self.tail, self.tail_rows)

    def over_shards(self, x: Tensor) -> Tensor:
        """[Q, S, ...] of the local shards -> [Q, shards, ...] of all, by `gather`."""
        return self.map.in_shard_order(self.gather(x).transpose(0, 1).flatten(1, 2), 1)

    def row_of_query(self) -> Tensor:
        """[Q] int64 request row of each query."""
        rows = torch.arange(self.rows.start, self.rows.stop, device=self.q.device)
        return rows.repeat_interleave(self.q.shape[0] // rows.numel(), output_size=self.q.shape[0])

    @property
    def asked(self) -> Asked:
        """What a Memory is told of these queries."""
        return Asked(self.layer, self.rows, self.positions)


GONE = {
    (
        "remap",
        "kept",
        "nbytes",
    ): "declare what it keeps per request in open(layer, pool, num_shards, rows), with rows.tensor or "
    "rows.beside, and it is moved and counted",
    ("moved", "turned"): "define rebuilt(layer, pool, change), which is told of both",
}
"""Methods of earlier routers, and what to write instead."""


class Router(ABC):
    """Scores pages. The caller adds the pinned pages (sink tokens, recent window) and takes the best up to the budget, over all ranks.

    Options of a router are keyword-only constructor arguments with defaults; they are keys of the "routing" block. What a router keeps per
    page is a summary of the pool (`open`), brought up to date after every append (`wrote`). A score must depend on the stored entries and
    the query alone, never on the number of ranks.
    """

    name: ClassVar[str]
    reads_all: ClassVar[bool] = False
    """True: nothing is ever left out, so the cache does not ask."""
    budgeted: ClassVar[bool] = True
    """False: the router itself says how much is read, the shards of `chosen_shards`."""

    wants_page_lse: ClassVar[bool] = False
    """True: `answered` is called after every read."""
    needs_experts: ClassVar[bool] = False
    """True: it follows the model's experts, and a dense model is refused."""
    reads_model_queries: ClassVar[bool] = False
    """True: it needs queries as the model computes them, not what codecs that fold maps into them pass on."""
    summarises: ClassVar[bool] = False
    """True: it keeps something per page, a summary that `open` adds to the pool."""

    by_page: ClassVar[bool] = False
    """True: what `wrote` keeps follows from the entries of each page alone, so that a rank need not be told of those of other ranks."""
    by_block: ClassVar[bool] = False
    """True: it scores blocks of pages as well (`routing.block_size`)."""
    whole_forwards: ClassVar[bool] = False
    """True: it is told of all entries of a forward at once, also when only the last of them may be taken back."""
    trained: PartFile | None = None
    """The file of trained weights that it was given: hosts check that they are of their model."""
    memories: tuple[Memory, ...] = ()
    """What it keeps of the queries that it was asked with."""

    @property
    def from_files(self) -> list[object]:
        """What it has from files, the same whatever is stored: it is not counted in the bytes of a cache."""
        return []

    @property
    def learns(self) -> bool:
        """Whether it keeps anything of entries or queries."""
        return bool(self.memories) or type(self).wrote is not Router.wrote

    @property
    def knows_pages_only(self) -> bool:
        """Whether a rank's pages are all that it must be told of."""
        return self.by_page or type(self).wrote is Router.wrote

    @property
    def rebuilds(self) -> bool:
        """Whether what is kept per page can be made for pages that were encoded again, or whose keys have another basis."""
        return not self.summarises or type(self).rebuilt is not Router.rebuilt

    def check(self, layers: list[LayerSpec], num_shards: int) -> None:  # noqa: B027
        """Refuse a model or a number of shards, on all ranks, that the router cannot serve. Raises: ConfigError."""

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        for names, instead in GONE.items():
            given = [name for name in names if name in vars(cls)]
            if given:
                raise TypeError(f"router {cls.__name__} defines {', '.join(given)}, which nobody calls any more: {instead}")

    def open(self, layer: int, pool: PagePool, num_shards: int, rows: Rows) -> None:  # noqa: B027
        """A new, empty pool of a layer: declare what is kept. num_shards: on all ranks.

        Per page: pool.add_summary; per request: rows.tensor; else, for example per shard: rows.beside. What is declared is counted,
        follows pages and rows wherever they go, and is 0 for new ones. Names begin with the layer.
        """

    def wrote(self, layer: int, pool: PagePool, new: NewEntries) -> None:  # noqa: B027
        """Entries were appended. Those of a forward of several tokens are reported after its queries, which must not see them."""

    def rebuilt(self, layer: int, pool: PagePool, change: PageChange) -> None:  # noqa: B027
        """Pages have other entries than before, and what is kept of them must be made anew from change.entries. Host phase.

        They have come from another pool (tiers/window.py): what is kept per request or shard has their entries already. Or keys of some
        rows have another basis, change.basis (tiers/bases.py): what is kept of keys or queries per request or shard must be in it too.
        """

    def missed(self, layer: int) -> Tensor | None:
        """[shards of all ranks] f32: reads of each shard that were in vain, mean over the rows; None = not counted."""
        return None

    def answered(self, asked: PageQuery, page_list: Tensor, page_lse: Tensor) -> None:  # noqa: B027
        """Queries read page_list [N, 1 or H, K] int32 (-1 = none) of this rank; page_lse [N, Hq, K] f32. With wants_page_lse."""

    def chosen_shards(self, asked: PageQuery) -> Tensor:
        """Of a router that is not budgeted: the shards of all ranks whose pages are read, [Q, shards] bool, the same on all ranks."""
        raise NotImplementedError(f"router {type(self).__name__} is not budgeted and has no chosen_shards()")

    @abstractmethod
    def score(self, asked: PageQuery) -> Tensor:
        """-> f32 [N, 1 or H, C], the higher the sooner read; -inf, and pages that are not visible, are not read. Sync: none."""


def scores_of(chosen: Tensor, asked: PageQuery) -> Tensor:
    """chosen [Q, S of all ranks] bool -> page scores [N, 1, C]: 0 in the local shards among them, -inf elsewhere."""
    local = asked.map.own(chosen, 1)
    score = torch.zeros_like(asked.visible, dtype=torch.float32).masked_fill(~local.unsqueeze(-1), -torch.inf)
    return score.flatten(0, 1).unsqueeze(1)


__getattr__ = moved(
    __name__,
    {
        "LayerStore": "pikv_ds.pages.pool:PagePool",
        "Stored": "pikv_ds.pages.view:PageView",
        "TurnedEntries": "pikv_ds.pages.events:PageChange",
    },
)

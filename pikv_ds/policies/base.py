"""Retention policy (the paper's "scheduling"): which pages stay when a budget is full.

Legend: P pages of the layer's store, R request rows, S local shards, C columns of a block table, T queries per row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from pikv_ds import ops
from pikv_ds.store import LayerStore


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What the queries of one forward looked at, in one layer. The last query of each row is in column T - 1."""

    share: Tensor
    """[P, T] f32: part of a query's attention that falls into a page, mean over query heads."""
    row: Tensor
    """[P] int64, the row that holds the page; R where no row does. A page shared by beams has the last of them."""
    real: Tensor
    """[R, T] bool: the column holds a query of the row, not padding."""
    entries: Tensor
    """[R] int64, entries of the row in all shards."""
    page_size: int
    time: int
    """Query columns before column 0, since the generation began."""

    @cached_property
    def asked(self) -> Tensor:
        """[P, T] bool: the column is a query of the page's row."""
        return torch.nn.functional.pad(self.real, (0, 0, 0, 1))[self.row]

    @cached_property
    def fair(self) -> Tensor:
        """[P] f32: the share of a full page if every entry of its row got the same."""
        return torch.nn.functional.pad(self.page_size / self.entries.clamp_min(1).float(), (0, 1), value=1.0)[self.row]


@dataclass(frozen=True, kw_only=True)
class Pages:
    """The pages of one layer on this rank, as the block tables name them."""

    store: LayerStore
    lens: Tensor
    """[R] int64, tokens of every row so far, evicted ones included."""
    rows: dict[str, Tensor] = field(default_factory=dict)
    """What the policy keeps per row, [R, ...]."""

    @cached_property
    def entries(self) -> Tensor:
        """[R, S, C] int64, entries in each page; 0 where a table has no page."""
        begin = torch.arange(self.store.block_table.shape[-1], device=self.lens.device) * self.store.page_size
        return (self.store.counts.to(torch.int64).unsqueeze(-1) - begin).clamp(0, self.store.page_size)

    @cached_property
    def slot_positions(self) -> Tensor:
        """[R, S, C, page_size] int32, the stored positions; anything in slots without an entry."""
        return self.store.positions[self.store.block_table.clamp_min(0)]

    @cached_property
    def last_position(self) -> Tensor:
        """[R, S, C] int32, largest position in each page; -1 where there is no page."""
        last = self.slot_positions.gather(-1, (self.entries - 1).clamp_min(0).unsqueeze(-1)).squeeze(-1)
        return torch.where(self.entries > 0, last, -1)

    def value(self, name: str) -> Tensor:
        """The policy's number of each page, [R, S, C]; 0 where there is no page."""
        return torch.where(self.entries > 0, self.store.summaries[name][self.store.block_table.clamp_min(0)], 0)

    def keys(self) -> Tensor:
        """[R, S, C, Hkv, page_size, Dk] f32: the keys as attention reads them. The open group of int8 and int4 is not in its page."""
        table = self.store.block_table.clamp_min(0)
        k, _ = ops.decode_pages(self.store.pages.index_select(0, table.view(-1)), self.store.fmt)
        return k.float().view(*table.shape, *k.shape[1:])


class RetentionPolicy(ABC):
    """Scores pages. The caller pins sinks, the recent window and open pages, then frees the lowest scores until the budget is met.

    Options of a policy are keyword-only constructor arguments with defaults; they are keys of the "scheduling" block.
    """

    name: ClassVar[str]
    keeps_all: ClassVar[bool] = False
    """True: nothing is ever evicted, so the cache need not ask."""
    page_values: ClassVar[dict[str, torch.dtype]] = {}
    """One number per page each, kept in the store; a policy that has any is shown what queries attend to."""
    sums_layers: ClassVar[bool] = False
    """Scores are summed over the layers, which then keep the same entries: needs pages that hold the same entries in every layer."""
    window: int | None = None
    """Only so many last queries of a forward matter; None = all of them."""

    def observe(self, values: dict[str, Tensor], seen: Seen) -> None:
        """Bring page_values, [P] each, up to date, in place. Runs in the step: no host sync."""
        assert not self.page_values, f"{type(self).__name__} has page_values and no observe()"

    @abstractmethod
    def score(self, pages: Pages) -> Tensor:
        """-> f32 [R, S, C]; higher stays longer, no NaN. Compared within a row only. Host phase."""

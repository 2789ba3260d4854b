"""Retention policy (the paper's "scheduling"): which pages stay when a budget is full.

Legend: P pages of the rows in one pool of a layer: a page that several rows share after a fork is there for each of them, as what a row
has attended to is its own. R request rows, S local shards, C columns of a block table, T queries per row. With budgets per head a page
holds one kv head, and every head of a request is a row of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from pikv_ds.codecs.part_file import PartFile
from pikv_ds.moved import moved
from pikv_ds.pages.listing import Pages
from pikv_ds.spec import LayerSpec

if TYPE_CHECKING:
    from pikv_ds.config.scheduling import SchedulingConfig


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What the queries of one forward looked at, in one layer. The last query of each row is in column T - 1."""

    share: Tensor
    """[P, T] f32: part of a query's attention that falls into a page, mean over query heads."""
    row: Tensor
    """[P] int64, the row that holds the page; R where no row does."""
    real: Tensor
    """[R, T] bool: the column holds a query of the row, not padding."""
    entries: Tensor
    """[R] int64, entries of the row in all shards."""
    page_size: int
    time: Tensor
    """[P] int64, queries of the page's row before column 0, where padding, which comes first, counts: column t is query time + t + 1."""

    @cached_property
    def at(self) -> Tensor:
        """[P, T] int32: which query of the page's row the column is, from 1 on, as `Pages.time` counts; anything where not `asked`."""
        columns = torch.arange(1, self.share.shape[1] + 1, device=self.share.device)
        return (self.time.unsqueeze(1) + columns).to(torch.int32)

    @cached_property
    def asked(self) -> Tensor:
        """[P, T] bool: the column is a query of the page's row."""
        return torch.nn.functional.pad(self.real, (0, 0, 0, 1))[self.row]

    @cached_property
    def fair(self) -> Tensor:
        """[P] f32: the share of a full page if every entry of its row got the same."""
        return torch.nn.functional.pad(self.page_size / self.entries.clamp_min(1).float(), (0, 1), value=1.0)[self.row]


class RetentionPolicy(ABC):
    """Scores pages. The caller pins sinks, the recent window and open pages, then frees the lowest scores until the budget is met.

    Options of a policy are keyword-only constructor arguments with defaults; they are keys of the "scheduling" block.
    """

    name: ClassVar[str]
    keeps_all: ClassVar[bool] = False
    """True: nothing is ever evicted, so the cache need not ask."""
    page_values: ClassVar[dict[str, torch.dtype]] = {}
    """One number per page and row each, kept in the pool; a policy that has any is shown what queries attend to."""
    observes_queries: ClassVar[bool] = False
    """True: row_values are kept, and observe_queries() is shown the queries themselves."""
    row_queries: ClassVar[tuple[str, ...]] = ()
    """Names of row_values that are queries, [Hq, Dk]: where keys change their basis (codec svd) the cache rebases them along."""
    reads_positions_only: ClassVar[bool] = False
    """True: a score follows from positions, counts and lengths alone, whatever is stored."""
    reads_model_queries: ClassVar[bool] = False
    """True: it needs queries and keys as the model computes them, not what codecs that fold maps into them pass on and store."""
    needs_one_shard: ClassVar[bool] = False
    """True: a page's score depends on all entries of its request, so that one shard must hold them."""
    needs_head_budget: ClassVar[str | None] = None
    """The value of scheduling.head_budget that the policy needs; None = any."""
    sums_layers: ClassVar[bool] = False
    """Scores are summed over the layers, which then keep the same entries: needs pages that hold the same entries in every layer."""
    trained: PartFile | None = None
    """The file of trained weights that it was given: hosts check that they are of their model."""
    target_hit_rate: float | None = None
    """Adaptive threshold: pages that score below theta go as well, theta += threshold_rate * (target_hit_rate - hit rate) per eviction."""
    threshold_rate: float = 0.0
    window: int | None = None
    """Only so many last queries of a forward matter; None = all of them."""

    def check(self, scheduling: SchedulingConfig, layers: list[LayerSpec]) -> None:  # noqa: B027
        """Refuse a block or a model that the policy cannot serve. layers: of full attention. Raises: ConfigError."""

    @property
    def watches(self) -> bool:
        """Whether attention must be measured for this policy."""
        return bool(self.page_values) or self.observes_queries

    def observe(self, values: dict[str, Tensor], seen: Seen) -> None:
        """Bring page_values, [P] each, up to date, in place. Runs in the step: no host sync."""
        assert not self.page_values, f"{type(self).__name__} has page_values and no observe()"

    def row_values(self, num_q_heads: int, k_dim: int) -> dict[str, tuple[int, ...]]:
        """Shapes of what is kept per row and layer, in f32, 0 for a new row; the first dimension, if there is one, is the query head."""
        return {}

    def observe_queries(self, rows: dict[str, Tensor], q: Tensor, lse: Tensor, positions: Tensor) -> None:
        """Bring row_values, [R, ...] each, up to date, in place. Runs in the step: no host sync.

        Args: q [R, T, Hq, Dk] f32, times the softmax scale; lse [R, T, Hq] of all they attend to; positions [R, T], -1 = padding (q may
            be NaN). The last query of a row is in column T - 1.
        """
        assert not self.observes_queries, f"{type(self).__name__} observes queries and has no observe_queries()"

    @abstractmethod
    def score(self, pages: Pages) -> Tensor:
        """-> f32 [R, S, C]; higher stays longer, no NaN. Compared within a row only. Host phase."""

    def hits(self, pages: Pages) -> Tensor:
        """-> bool [R, S, C]: pages used since the last eviction; for an adaptive threshold."""
        raise NotImplementedError(f"{type(self).__name__} has a target_hit_rate and no hits()")


class TokenPolicy(RetentionPolicy):
    """A policy with a score for every entry, computed from what is stored. A page has the mean of its entries."""

    @abstractmethod
    def entry_scores(self, pages: Pages) -> Tensor:
        """-> f32 [R, S, C, page_size]; anything but NaN where no entry is. Host phase."""

    def score(self, pages: Pages) -> Tensor:
        total = torch.where(pages.filled, self.entry_scores(pages), 0).sum(-1)
        return total / pages.entries.clamp_min(1)


__getattr__ = moved(__name__, {"LayerStore": "pikv_ds.pages.pool:PagePool", "read_back": "pikv_ds.pages.entries"})

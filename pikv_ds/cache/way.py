"""What the two ways of a layer, replicated.py and distinct.py, ask of the cache they work for."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from pikv_ds.exchange.exchange import Exchange
from pikv_ds.migration.schedule import Rebalancing
from pikv_ds.pages.layers import RankPages
from pikv_ds.placement.shard_map import ShardMap
from pikv_ds.selection.selection import Selection
from pikv_ds.step.agreement import Agreed, Agreement, Announced
from pikv_ds.step.query import Partial, Query
from pikv_ds.step.step import LocalStep, Step

from .reader import Reader
from .writer import Writer


class Way(Protocol):
    """How a layer's queries are answered when the ranks hold the same requests, or each its own. Keeps nothing between layers."""

    def attend(self, query: Query) -> Partial: ...

    def flush(self, step: Step) -> None:
        """After the last layer: entries and lse that no later layer takes along."""


class Core(Protocol):
    """A PiKVCache, as far as a way knows it: its parts, the running forward, and how that is opened."""

    device: torch.device
    exchange: Exchange
    map: ShardMap
    agreement: Agreement
    pages: RankPages
    reader: Reader
    rebalancing: Rebalancing
    writer: Writer
    selection: Selection | None
    late_experts: bool
    ways: dict[str, Way]

    # The running forward: a way opens it, with what this rank brings.
    local: LocalStep
    announced: Announced
    step: Step | None

    def agree(self, headers: list[list[int]], k: Tensor) -> None: ...

    def open(self, agreed: Agreed, announced: list[Announced]) -> None: ...

"""What the two ways of a layer, replicated.py and distinct.py, ask of the cache they work for."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from pikv_ds.exchange.exchange import Exchange
from pikv_ds.pages.events import Written
from pikv_ds.placement.placement import Routed
from pikv_ds.placement.shard_map import ShardMap
from pikv_ds.retention.attention import Waiting
from pikv_ds.selection.selection import Selection
from pikv_ds.step.agreement import Agreed, Agreement
from pikv_ds.step.query import Partial, Query, Staged
from pikv_ds.step.step import LocalStep, StepPlan

from .reader import PoolReader


class Way(Protocol):
    """How a layer's queries are answered when the ranks hold the same requests, or each its own."""

    def attend(self, query: Query) -> Partial: ...

    def flush_staged(self) -> None: ...


class Core(Protocol):
    """A PiKVCache, as far as a way knows it: its parts, the running forward, and what is done for every layer alike."""

    device: torch.device
    exchange: Exchange
    map: ShardMap
    agreement: Agreement
    reader: PoolReader
    selection: Selection | None
    stages: bool
    replicated_way: Way
    distinct_way: Way

    # The running forward: a way opens it, and leaves what waits for a later layer.
    local: LocalStep
    plan: StepPlan
    hold: bool
    staged: Staged | None
    waiting: Waiting | None

    def settle(self, headers: list[list[int]], k: Tensor) -> None: ...

    def adopt(self, agreed: Agreed) -> None: ...

    def append(self, layer: int, k: Tensor, v: Tensor, expert_ids: Routed | Tensor | None) -> Written: ...

    def watch(self, query: Query, written: Written | None, lse: Tensor | None) -> None: ...

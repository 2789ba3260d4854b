"""How many pages a query reads, from sizes that every rank knows on the host. R rows."""

from __future__ import annotations

from math import ceil
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pikv_ds.config.routing import RoutingConfig
from pikv_ds.staging import sent


class NearPages(Protocol):
    """What is known of the pages that every query reads besides (tiers/window.py)."""

    sinks: int

    def near_span(self, seen: list[int]) -> int:
        """Most positions of a row of these lengths that they can hold, sinks not counted; the same on every rank."""


class Budget(NamedTuple):
    """Pages to read in one forward. pages: [R] int64 per row, pinned ones included; None = width for every query, which holds its pinned
    pages. width: host bound of what a query can get."""

    pages: Tensor | None
    width: int


def page_budget(
    config: RoutingConfig, seen: list[int], page_size: int, num_shards: int, device: torch.device, near: NearPages | None = None
) -> Budget:
    """seen: stored tokens that the queries of each row see in this layer. near: some of its pages are near pages, pinned as well."""
    pages = [config.budget_pages or ceil(config.budget_ratio * n / page_size) for n in seen]
    # Sinks and recent tokens may lie in all shards, and end inside a page in each.
    pinned = min(config.sink_tokens, config.sink_tokens // page_size + num_shards)
    pinned += min(config.recent_tokens, config.recent_tokens // page_size + 2 * num_shards)
    if near is not None:
        pinned += min(near.sinks, near.sinks // page_size + num_shards) + near.near_span(seen) // page_size + 2 * num_shards
    width = min(max(*pages, pinned), max(seen) // page_size + 2 * num_shards)
    alike = min(pages) == max(pages) >= pinned
    return Budget(None if alike else sent(pages, torch.int64, device), width)

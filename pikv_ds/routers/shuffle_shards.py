from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pikv_ds.pages.pool import PagePool
from pikv_ds.pages.rows import Rows
from pikv_ds.routers import ROUTERS
from pikv_ds.routers.base import NewEntries, PageChange, PageQuery, Router, scores_of
from pikv_ds.routers.earlier import Earlier
from pikv_ds.routers.scramble import scramble
from pikv_ds.routers.shard_router import ShardRouter
from pikv_ds.spec import LayerSpec


@ROUTERS.register("shuffle_shards")
class ShuffleShards(Router):
    """Control for any shard router: read the shards that it chose for another query, so that each keeps its popularity.

    The router `base`, with the options `base_options`, chooses for the query itself; what is read are the shards that it chose for one of
    the latest 128 queries of the row, drawn by a hash of the position (before there is one: its own, moved on by a drawn number of shards).
    As many shards as `base` reads, as often each; what `base` holds more of the attention, it owes to the query.
    """

    budgeted = False

    def __init__(self, *, base: str = "topk", base_options: dict[str, Any] | None = None) -> None:
        names = [name for name, router in ROUTERS.items() if issubclass(router, ShardRouter)]
        if base not in names:
            raise ValueError(f"base = one of {', '.join(map(repr, names))}, got {base!r}; for routers of pages the control is 'shuffle'")
        try:
            self.base = ROUTERS.build(base, **base_options or {})
        except TypeError as error:
            raise ValueError(f"base_options = options of the router {base!r}, got {base_options}: {error}") from None
        self.earlier = Earlier()
        self.memories = (*self.base.memories, self.earlier.memory)
        for capability in ("needs_experts", "wants_page_lse", "reads_model_queries", "summarises"):
            setattr(self, capability, getattr(self.base, capability))

    def check(self, layers: list[LayerSpec], num_shards: int) -> None:
        self.base.check(layers, num_shards)

    def open(self, layer: int, pool: PagePool, num_shards: int, rows: Rows) -> None:
        self.base.open(layer, pool, num_shards, rows)
        self.earlier.open(layer, rows)

    def wrote(self, layer: int, pool: PagePool, new: NewEntries) -> None:
        self.base.wrote(layer, pool, new)

    def rebuilt(self, layer: int, pool: PagePool, change: PageChange) -> None:
        self.base.rebuilt(layer, pool, change)

    def missed(self, layer: int) -> Tensor | None:
        return self.base.missed(layer)

    def answered(self, asked: PageQuery, page_list: Tensor, page_lse: Tensor) -> None:
        """Misses are those of the shards that were read: the ones that `base` chose and nobody read are not known."""
        self.base.answered(asked, page_list, page_lse)

    def chosen_shards(self, asked: PageQuery) -> Tensor:
        own = self.base.chosen_shards(asked)
        drawn, num_shards = self.earlier.swap(asked, own), own.shape[1]
        step = 1 + scramble(asked.positions, 1) % max(num_shards - 1, 1)
        shard = (torch.arange(num_shards, device=own.device) - step.unsqueeze(1)) % num_shards
        return torch.where(drawn.any(-1, keepdim=True), drawn, own.gather(1, shard))

    def score(self, asked: PageQuery) -> Tensor:
        return scores_of(self.chosen_shards(asked), asked)

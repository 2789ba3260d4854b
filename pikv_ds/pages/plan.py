"""How the pages of every layer are laid out, before there are any: what RankPages are built from. Numbers and maps, no device memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch

from pikv_ds.codecs.maps import Transform
from pikv_ds.ops import PageFormat
from pikv_ds.spec import LayerSpec


@dataclass(frozen=True, kw_only=True)
class PoolPlan:
    """One pool of a layer."""

    fmt: PageFormat
    mapped: bool = False
    """Its entries are coefficients of what the layer is given; otherwise they are that, encoded."""
    always_read: bool = True
    """Every query reads it; otherwise a router chooses among its pages."""
    block_size: int | None = None
    """Tokens that a router chooses as one; None: those of a page."""


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    spec: LayerSpec
    pools: tuple[PoolPlan, ...]
    """Nearest first: entries are appended to the first, and pages move on from each to the next."""
    transform: Transform | None
    """Between the model's heads and what pages of the codec hold; None = they are the same, or maps belong to requests."""
    columns: dict[str, torch.dtype]
    """Numbers kept per page for policies."""

    @property
    def entry_maps(self) -> Transform | None:
        """What a layer is given is mapped by this before it is stored, and so are its queries; None: only pools behind map."""
        return None if any(pool.mapped for pool in self.pools) else self.transform

    @property
    def unrotated(self) -> Transform | None:
        """The maps of a layer whose pages hold keys before their rotation; with several pools all but the nearest."""
        return None if self.transform is None or self.transform.inv_freq is None else self.transform

    @property
    def routed(self) -> int | None:
        """The pool that a router chooses from; None: every query reads all."""
        return next((level for level, pool in enumerate(self.pools) if not pool.always_read), None)


@dataclass(frozen=True, kw_only=True)
class PagesPlan:
    layers: tuple[LayerPlan, ...]
    page_size: int
    heads: int
    """Tables of a request row and shard: 1, or the KV heads when each has pages of its own."""
    num_shards: int
    dtype: torch.dtype
    rebased: bool
    """What is stored of a request gets another basis while it grows (tiers/bases.py)."""

    def to(self, device: torch.device) -> Self:
        """With the maps of all layers on a device."""
        moved = (replace(plan, transform=None if plan.transform is None else plan.transform.to(device)) for plan in self.layers)
        return replace(self, layers=tuple(moved))

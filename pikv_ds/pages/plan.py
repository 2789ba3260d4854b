"""How the pages of every layer are laid out, before there are any: what Tables are built from. Numbers and maps, no device memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch

from pikv_ds.codecs.maps import Transform
from pikv_ds.ops import PageFormat
from pikv_ds.spec import LayerSpec


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    spec: LayerSpec
    near: PageFormat
    """Of the pool that entries are appended to."""
    far: PageFormat | None
    """Of the pool that they are demoted to (tiers/window.py); None = there is one pool."""
    transform: Transform | None
    """Between the model's heads and what pages of the codec hold; None = they are the same, or maps belong to requests."""
    maps_near: bool
    """What is appended is mapped already; otherwise only what is demoted is."""
    columns: dict[str, torch.dtype]
    """Numbers kept per page for policies."""

    @property
    def near_maps(self) -> Transform | None:
        return self.transform if self.maps_near else None

    @property
    def far_maps(self) -> Transform | None:
        return None if self.maps_near else self.transform

    @property
    def undone(self) -> Transform | None:
        """The maps of a layer whose pages hold keys before their rotation; with two pools the far ones."""
        return None if self.transform is None or self.transform.inv_freq is None else self.transform


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

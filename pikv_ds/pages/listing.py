"""The pages of both pools of a layer as a retention policy sees them: one table, as if one store held them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pikv_ds.codecs.request_maps import PageMaps
from pikv_ds.policies.base import Pages
from pikv_ds.retention.choose import fit

from .pool import LayerStore


@dataclass(frozen=True, kw_only=True)
class JoinedPages(Pages):
    """Pages of each table in the order of their first positions, which is the order that one pool would have.

    Budgets, candidates and choices then are the same for one pool and for two. Ids in `table` belong to the page's own pool.
    """

    parts: tuple[Pages, ...]
    maps: PageMaps | None
    """What far pages hold are coefficients; keys and values are what they stand for."""
    order: Tensor
    """[R, S, C] int64, for each column its place among the columns of all parts, one after the other."""

    @classmethod
    def of(cls, parts: list[Pages], maps: PageMaps | None) -> JoinedPages:
        """parts: near and far, in this order."""
        near = parts[0]
        parts = [part for part in parts if part.store.num_pages] or parts[:1]
        first = [torch.where(part.entries > 0, part.slot_positions[..., 0], torch.iinfo(torch.int32).max) for part in parts]
        order = torch.cat(first, -1).argsort(dim=-1, stable=True)
        return cls(
            store=near.store, table=torch.cat([part.table for part in parts], -1).gather(-1, order),
            counts=sum(part.counts for part in parts), lens=near.lens, rows=near.rows, time=near.time, last_eviction=near.last_eviction,
            layer=near.layer, maps=maps, parts=tuple(parts), order=order,
        )  # fmt: skip

    def by_pool(self, chosen: Tensor) -> list[tuple[LayerStore, Tensor]]:
        """chosen [R, S, C'] bool of the first C' columns -> the pools with pages, and [R, S, C of the pool] for each."""
        back = torch.zeros_like(self.order, dtype=torch.bool).scatter_(-1, self.order, fit(chosen, self.order.shape[-1], False))
        columns = back.split([part.table.shape[-1] for part in self.parts], -1)
        return [(part.store, own) for part, own in zip(self.parts, columns, strict=True)]

    def _joined(self, values: list[Tensor]) -> Tensor:
        """[R, S, C of the pool, ...] of each pool -> [R, S, C, ...]."""
        whole = torch.cat(values, 2)
        index = self.order.view(*self.order.shape, *[1] * (whole.dim() - 3))
        return whole.gather(2, index.expand(*self.order.shape, *whole.shape[3:]))

    @cached_property
    def entries(self) -> Tensor:
        return self._joined([part.entries for part in self.parts])

    @cached_property
    def slot_positions(self) -> Tensor:
        return self._joined([part.slot_positions for part in self.parts])

    def value(self, name: str) -> Tensor:
        return self._joined([part.value(name) for part in self.parts])

    @property
    def keys(self) -> Tensor:
        return self._joined([self._model(part, part.keys, "k") for part in self.parts])

    @property
    def values(self) -> Tensor:
        return self._joined([self._model(part, part.values, "v") for part in self.parts])

    def _model(self, part: Pages, x: Tensor, side: str) -> Tensor:
        """x [R, S, C, Hkv, page_size, D] of one pool as the model has it, 0 where no entry is."""
        if self.maps is None or part.store is self.store or part.store.turned is not None:
            return x
        return torch.where(part.filled[:, :, :, None, :, None], self.maps.decode_pages(x, side), 0)

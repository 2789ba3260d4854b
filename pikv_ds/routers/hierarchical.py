from typing import Literal

import torch
from torch import Tensor

from pikv_ds.pages.pool import LayerStore
from pikv_ds.routers import ROUTERS
from pikv_ds.routers.base import NewEntries, PageQuery, TurnedEntries
from pikv_ds.routers.bounds import PageBounds

_MAX = torch.finfo(torch.float32).max


@ROUTERS.register("hierarchical")
class Hierarchical(PageBounds):
    """First the shards whose keys could score highest, then the best pages inside these, both by min and max key.

    Shards by the bound of `bounds` with spread 1 and "max", pages by its score with the options given here.
    A shard's bounds cover all entries that a request ever stored in it (with codec svd: that lay there when its basis last changed, and
    later ones). A rank is visited when it holds a chosen shard. With no more shards than `top_shards` this is `bounds`. Chosen per kv
    head. Bytes: those of bounds; as metadata, which does not grow with the context,
    2 * num_kv_heads * k_dim f32 per request, layer and shard, on every rank so that choosing shards needs no message.
    """

    def __init__(
        self,
        *,
        top_shards: int = 2,
        spread: float = 0.4,
        heads: Literal["mean", "max"] = "mean",
        metadata: Literal["fp32", "bf16", "fp16", "int8"] = "bf16",
    ) -> None:
        if top_shards < 1:
            raise ValueError(f"top_shards of at least 1, got {top_shards}")
        super().__init__(spread=spread, heads=heads, metadata=metadata)
        self.top_shards = top_shards
        self.shard_bounds: dict[int, Tensor] = {}  # layer -> [R, shards, H, 2, D] f32

    def open(self, layer: int, store: LayerStore, num_shards: int) -> None:
        super().open(layer, store, num_shards)
        shape = (store.counts.shape[0], num_shards, store.fmt.num_kv_heads, 2, store.k_dim)
        self.shard_bounds[layer] = self._empty(torch.empty(shape, device=store.device))

    @staticmethod
    def _empty(bounds: Tensor) -> Tensor:
        bounds[..., 0, :], bounds[..., 1, :] = torch.inf, -torch.inf
        return bounds

    def remap(self, layer: int, parent: Tensor) -> None:
        old = self.shard_bounds[layer]
        fresh = self._empty(torch.empty_like(old[:1]))
        self.shard_bounds[layer] = torch.where((parent >= 0).view(-1, 1, 1, 1, 1), old[parent.clamp_min(0)], fresh)

    def wrote(self, layer: int, store: LayerStore, new: NewEntries) -> None:
        super().wrote(layer, store, new)
        self._widen(self.shard_bounds[layer], new)

    @staticmethod
    def _widen(shard_bounds: Tensor, new: NewEntries) -> None:
        bounds, valid = shard_bounds.flatten(0, 1), new.valid.view(-1, 1, 1)
        at = torch.where(new.valid, new.rows * shard_bounds.shape[1] + new.shard, 0)
        k = new.k.float()
        at = at.view(-1, 1, 1).expand_as(k)
        bounds[:, :, 0] = bounds[:, :, 0].scatter_reduce(0, at, torch.where(valid, k, torch.inf), "amin")
        bounds[:, :, 1] = bounds[:, :, 1].scatter_reduce(0, at, torch.where(valid, k, -torch.inf), "amax")

    def turned(self, layer: int, store: LayerStore, new: TurnedEntries) -> None:
        """A box does not turn: bounds are made of what is stored, of all shards by one collective when there are several ranks."""
        super().turned(layer, store, new)
        bounds = self.shard_bounds[layer]
        bounds[new.rows] = self._empty(torch.empty_like(bounds[new.rows]))
        self._widen(bounds, new.entries)
        found = new.gather(bounds[new.rows])
        bounds[new.rows] = torch.stack((found[..., 0, :].amin(0), found[..., 1, :].amax(0)), -2)

    def score(self, asked: PageQuery) -> Tensor:
        scores, num_shards = super().score(asked), self.shard_bounds[asked.layer].shape[1]
        if num_shards <= self.top_shards:
            return scores
        bounds = self.shard_bounds[asked.layer][asked.row_of_query()].clamp(-_MAX, _MAX)  # [Q, shards, H, 2, D]
        q = (asked.q.float() * asked.scale).unflatten(1, (bounds.shape[2], -1))  # [Q, H, G, D]
        shard = torch.einsum("qhgd,qshd->qhsg", q.clamp_max(0), bounds[..., 0, :]) + torch.einsum(
            "qhgd,qshd->qhsg", q.clamp_min(0), bounds[..., 1, :]
        )
        best = shard.amax(-1).topk(self.top_shards).indices  # [Q, H, top]
        local = torch.arange(asked.shards.start, asked.shards.stop, device=best.device).view(1, -1, 1, 1)
        chosen = (best.unsqueeze(1) == local).any(-1)  # [Q, S, H]
        return scores.masked_fill(~chosen.flatten(0, 1).unsqueeze(-1), -torch.inf)

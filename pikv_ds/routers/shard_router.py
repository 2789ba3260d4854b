"""What the paper's routers share: a gate over shards, by the mean key of every shard. S shards on all ranks, R rows, H kv heads."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor

from pikv_ds.pages.pool import LayerStore
from pikv_ds.routers.base import NewEntries, PageQuery, Router, TurnedEntries


class ShardRouter(Router):
    """Reads every page of the `top_k` shards of the highest logit, one choice for all heads; no budget of pages.

    Every rank has the keys of all new entries, so all keep the same means and choose alike without a message.
    """

    budgeted = False

    def __init__(self, *, top_k: int = 1) -> None:
        if top_k < 1:
            raise ValueError(f"top_k of at least 1, got {top_k}")
        self.top_k = top_k
        self.sums: dict[int, Tensor] = {}  # layer -> [R, S, H, D] f32 sum of the keys ever stored
        self.counts: dict[int, Tensor] = {}  # layer -> [R, S] f32

    def open(self, layer: int, store: LayerStore, num_shards: int) -> None:
        shape = (store.counts.shape[0], num_shards)
        self.sums[layer] = torch.zeros(*shape, store.fmt.num_kv_heads, store.k_dim, device=store.device)
        self.counts[layer] = torch.zeros(shape, device=store.device)

    def kept(self) -> Iterable[Tensor]:
        return [*self.sums.values(), *self.counts.values()]

    def remap(self, layer: int, parent: Tensor) -> None:
        for kept in (self.sums, self.counts):
            old = kept[layer][parent.clamp_min(0)]
            kept[layer] = old * (parent >= 0).view(-1, *[1] * (old.dim() - 1))

    def wrote(self, layer: int, store: LayerStore, new: NewEntries) -> None:
        at = torch.where(new.valid, new.rows * self.counts[layer].shape[1] + new.shard, 0)
        self.counts[layer].view(-1).index_add_(0, at, new.valid.float())
        self.sums[layer].flatten(0, 1).index_add_(0, at, new.k.float().masked_fill(~new.valid.view(-1, 1, 1), 0))

    def turned(self, layer: int, store: LayerStore, new: TurnedEntries) -> None:
        """Sums are linear in the keys, those of evicted entries included."""
        sums = self.sums[layer]
        sums[new.rows] = torch.einsum("nshr,nhrt->nsht", sums[new.rows], new.turn)

    def mean_logits(self, q: Tensor, asked: PageQuery) -> Tensor:
        """[Q, S] f32: scale q mu_s, mean over query heads; -inf for a shard without entries of the request."""
        row, counts = asked.row_of_query(), self.counts[asked.layer]
        mean = (self.sums[asked.layer] / counts.clamp_min(1)[..., None, None])[row]  # [Q, S, H, D]
        q = q.float().unflatten(1, (mean.shape[2], -1)).mean(2)
        logits = asked.scale * torch.einsum("qhd,qshd->qs", q, mean) / mean.shape[2]
        return logits.masked_fill(counts[row] == 0, -torch.inf)

    @abstractmethod
    def logits(self, asked: PageQuery) -> Tensor:
        """-> [Q, S] f32; -inf is never chosen."""

    def chosen_shards(self, asked: PageQuery) -> Tensor:
        """[Q, S] bool. The lower shard on ties."""
        logits = self.logits(asked)
        order = logits.sort(dim=-1, descending=True, stable=True).indices[:, : self.top_k]
        chosen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, order, True)
        return chosen & (logits > -torch.inf)

    def score(self, asked: PageQuery) -> Tensor:
        self.chosen = self.chosen_shards(asked)
        return scores_of(self.chosen, asked)


def scores_of(chosen: Tensor, asked: PageQuery) -> Tensor:
    """chosen [Q, S of all ranks] bool -> page scores [N, 1, C]: 0 in the local shards among them, -inf elsewhere."""
    local = asked.map.own(chosen, 1)
    score = torch.zeros_like(asked.visible, dtype=torch.float32).masked_fill(~local.unsqueeze(-1), -torch.inf)
    return score.flatten(0, 1).unsqueeze(1)

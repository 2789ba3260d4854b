"""What the paper's routers share: a gate over shards, by the mean key of every shard. S shards on all ranks, R rows, H kv heads."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from pikv_ds.pages.pool import PagePool
from pikv_ds.pages.rows import RowColumn, Rows
from pikv_ds.routers.base import NewEntries, PageChange, PageQuery, Router, scores_of


class ShardRouter(Router):
    """Reads every page of the `top_k` shards of the highest logit, one choice for all heads; no budget of pages.

    Every rank has the keys of all new entries, so all keep the same means and choose alike without a message.
    """

    budgeted = False

    def __init__(self, *, top_k: int = 1) -> None:
        if top_k < 1:
            raise ValueError(f"top_k of at least 1, got {top_k}")
        self.top_k = top_k
        self.sums: dict[int, RowColumn] = {}  # layer -> [R, S, H, D] f32 sum of the keys ever stored
        self.counts: dict[int, RowColumn] = {}  # layer -> [R, S] f32

    def open(self, layer: int, pool: PagePool, num_shards: int, rows: Rows) -> None:
        self.sums[layer] = rows.tensor(f"{layer}.sums", (num_shards, pool.fmt.num_kv_heads, pool.reader.k_dim))
        self.counts[layer] = rows.tensor(f"{layer}.counts", (num_shards,))

    def wrote(self, layer: int, pool: PagePool, new: NewEntries) -> None:
        counts = self.counts[layer].value
        at = torch.where(new.valid, new.rows * counts.shape[1] + new.shard, 0)
        counts.view(-1).index_add_(0, at, new.valid.float())
        self.sums[layer].value.flatten(0, 1).index_add_(0, at, new.k.float().masked_fill(~new.valid.view(-1, 1, 1), 0))

    def rebuilt(self, layer: int, pool: PagePool, change: PageChange) -> None:
        """Sums are linear in the keys, those of evicted entries included."""
        if change.basis is not None:
            rows, by = change.basis
            sums = self.sums[layer].value
            sums[rows] = torch.einsum("nshr,nhrt->nsht", sums[rows], by)

    def mean_logits(self, q: Tensor, asked: PageQuery) -> Tensor:
        """[Q, S] f32: scale q mu_s, mean over query heads; -inf for a shard without entries of the request."""
        row, counts = asked.row_of_query(), self.counts[asked.layer].value
        mean = (self.sums[asked.layer].value / counts.clamp_min(1)[..., None, None])[row]  # [Q, S, H, D]
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
        return scores_of(self.chosen_shards(asked), asked)

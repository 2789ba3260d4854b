from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from pikv_ds.errors import ConfigError
from pikv_ds.routers.kv_gate import KVGate
from pikv_ds.training.attended import Attended, attended, chosen, positions
from pikv_ds.training.part import LearnedPart
from pikv_ds.training.parts import PARTS
from pikv_ds.training.recorded import ModelFacts, Window, Windows
from pikv_ds.training.reinforce import Cost, policy_loss

BEGINS_WITH = 8  # windows of first weights


@PARTS.register("kv_gate")
class KVGatePart(LearnedPart):
    """Scores of pages from the query and codes of their keys, distilled from the frozen model's own attention.

    loss = sum over queries of KL(m / sum m, softmax of the scores) sum m / mean of sum m, mean over layers and kv heads; m [C] = attention
    of the query to every full page behind the sinks. A query with nothing to find weighs nothing.
    learn "reinforce" is the paper's R_A (pikv_ds/training/reinforce.py): sets of pages are drawn by the scores, and the reward of a set is
    the attention that it holds minus rank_cost and tier_cost for what it visits. balance: weight of shards sum_s p_s^2 - 1 for "distill",
    p_s the mean share of shard s in the scores, where page c lies in shard c mod shards.
    """

    serves = "routing.method = learned"

    def __init__(
        self, *, page_size: int = 16, bits: Literal[2, 4] = 2, rank: int | None = None, totals: int = 4, queries: int = 64,
        sinks: int = 4, recent: int = 16, ratio: float = 0.125, balance: float = 0.0, shards: int = 4,
        learn: Literal["distill", "reinforce"] = "distill", rank_cost: float = 0.0, tier_cost: float = 0.0, draws: int = 8,
    ) -> None:  # fmt: skip
        """rank: numbers of a code, None = the key's width. queries: of each window. ratio: share that the held-out objective reads."""
        if bits not in (2, 4) or min(totals, queries, page_size, shards) < 1 or not 0 < ratio <= 1:
            raise ValueError(
                f"bits of 2 or 4, totals, queries, page_size and shards of 1 or more, ratio up to 1; got bits {bits}, totals {totals}, "
                f"queries {queries}, page_size {page_size}, shards {shards}, ratio {ratio}"
            )
        self.page_size, self.bits, self.rank, self.totals, self.queries = page_size, bits, rank, totals, queries
        self.sinks, self.recent, self.ratio, self.balance, self.shards = sinks, recent, ratio, balance, shards
        if learn not in ("distill", "reinforce") or draws < 2:
            raise ValueError(f"learn 'distill' or 'reinforce' and draws of 2 or more, got {learn!r} and {draws}")
        self.learn, self.rank_cost, self.tier_cost, self.draws = learn, rank_cost, tier_cost, draws

    def options(self) -> dict[str, object]:
        return dict(vars(self))

    def build(self, facts: ModelFacts) -> nn.Module:
        for i, layer in enumerate(facts.trained_layers):
            rank, whole = self.rank or layer.k_dim, 8 // self.bits
            if rank % whole or not whole <= rank <= layer.k_dim:
                raise ConfigError(f"rank {rank} of layer {i}: legal is a multiple of {whole} up to its key width {layer.k_dim}")
        return KVGate(facts.trained_layers, bits=self.bits, rank=self.rank, totals=self.totals)

    def begin(self, module: nn.Module, data: Windows) -> None:
        windows = [data[i] for i in range(min(BEGINS_WITH, len(data)))]
        for i, gate in enumerate(module.layers):
            keys = torch.cat([window.layers[i].k for window in windows]).float().cpu()
            q = torch.cat([window.layers[i].q for window in windows]).float().cpu()
            gate.begin(keys, q.unflatten(1, (keys.shape[1], -1)))

    def loss(self, module: nn.Module, window: Window, generator: torch.Generator) -> dict[str, Tensor]:
        first = min(4 * self.page_size, len(window.ids) // 2)
        at = positions(len(window.ids), window.question, self.queries, first, generator)
        losses, uneven, policies = [], [], []
        for i, layer in enumerate(window.layers):
            seen = attended(layer, at, self.page_size, self.sinks, 0)  # forwards of several tokens choose among recent pages, too
            share = self._score(module, i, seen).log_softmax(-1).masked_fill(~seen.open, 0)
            wanted = seen.mass * seen.open
            if self.learn == "reinforce":
                policies.append(self._policy(self._score(module, i, seen), wanted, generator))
            found = wanted.sum(-1, keepdim=True)
            target = wanted / found.clamp_min(1e-9)
            kl = (wanted * (target.clamp_min(1e-9).log() - share)).sum(-1)
            losses.append(kl.mean() / found.mean().clamp_min(1e-9))
            uneven.append(self._uneven(share.exp() * seen.open))
        kl, uneven = torch.stack(losses).mean(), torch.stack(uneven).mean()
        if self.learn == "reinforce":
            loss, reward = (torch.stack(x).mean() for x in zip(*policies, strict=True))
            return {"loss": loss, "reward": reward, "kl": kl.detach(), "uneven": uneven.detach()}
        return {"loss": kl + self.balance * uneven, "kl": kl, "uneven": uneven}

    def _policy(self, score: Tensor, wanted: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Sets of as many pages as a budget of `ratio` leaves beside pinned ones, of the queries that have more to choose from."""
        pages, size = score.shape[-1], max(1, int(self.ratio * score.shape[-1]) - 3)
        enough = (score > -1e29).sum(-1).flatten() > size
        cost = Cost(ranks=self.rank_cost, tiers=self.tier_cost, shards=self.shards, near=pages // 2)
        return policy_loss(score.flatten(0, 1)[enough], wanted.flatten(0, 1)[enough], size, self.draws, cost, generator)

    @torch.no_grad()
    def held_out(self, module: nn.Module, window: Window) -> dict[str, Tensor]:
        """The attention that the chosen pages hold, pinned ones included, and what the best choice holds: where the window asks, or else
        over its second half."""
        length, asks = len(window.ids), torch.nonzero(window.question).flatten().cpu()
        at = asks if len(asks) else torch.arange(length // 2, length, 8)
        held, best = [], []
        for i, layer in enumerate(window.layers):
            seen = attended(layer, at, self.page_size, self.sinks, self.recent)
            for kept, score in ((held, self._score(module, i, seen)), (best, seen.mass)):
                kept.append((seen.mass * chosen(score, seen, at, self.ratio, self.page_size)).sum(-1).mean())
        return {"objective": torch.stack(held).mean(), "oracle": torch.stack(best).mean()}

    def _score(self, module: nn.Module, index: int, seen: Attended) -> Tensor:
        """[Q, H, C], far below the others for pages that are not open."""
        return module(index, seen.q, seen.keys, self.page_size).masked_fill(~seen.open, -1e30)

    def _uneven(self, share: Tensor) -> Tensor:
        """share [Q, H, C] -> 0 where all shards get the same of it on average, shards - 1 where one gets all."""
        mean = share.mean((0, 1))
        by_shard = torch.nn.functional.pad(mean, (0, -len(mean) % self.shards)).unflatten(0, (-1, self.shards)).sum(0)
        return self.shards * (by_shard / by_shard.sum().clamp_min(1e-9)).square().sum() - 1

from __future__ import annotations

import torch
from torch import Tensor, nn

from pikv_ds.routers.kv_gate import KVGate, summarise
from pikv_ds.training.part import LearnedPart
from pikv_ds.training.parts import PARTS
from pikv_ds.training.recorded import LayerWindow, ModelFacts, Window


@PARTS.register("kv_gate")
class KVGatePart(LearnedPart):
    """Scores of pages from the query and a summary of each page's keys, distilled from the model's own attention.

    loss = KL of the attention mass of pages, as the frozen model gives it, to the scores; mean over layers, kv heads and drawn queries.
    """

    serves = "routing.method = learned"

    def __init__(self, *, page_size: int = 16, queries: int = 128, ratio: float = 0.125) -> None:
        """queries: drawn from each window. ratio: share of the pages that the held-out objective reads."""
        self.page_size, self.queries, self.ratio = page_size, queries, ratio

    def options(self) -> dict[str, object]:
        return {"page_size": self.page_size, "queries": self.queries, "ratio": self.ratio}

    def build(self, facts: ModelFacts) -> nn.Module:
        return KVGate(facts.trained_layers)

    def loss(self, module: nn.Module, window: Window, generator: torch.Generator) -> dict[str, Tensor]:
        first = 4 * self.page_size
        at = first + torch.randperm(len(window.ids) - first, generator=generator)[: self.queries]
        losses = []
        for i, layer in enumerate(window.layers):
            score, mass = self.scored(module, i, layer, at)
            target = mass / mass.sum(-1, keepdim=True)
            losses.append(torch.nn.functional.kl_div(score.log_softmax(-1), target, reduction="batchmean") / mass.shape[1])
        return {"loss": torch.stack(losses).mean()}

    def held_out(self, module: nn.Module, window: Window) -> dict[str, Tensor]:
        at = torch.arange(len(window.ids) // 2, len(window.ids), 8)
        shares = []
        for i, layer in enumerate(window.layers):
            score, mass = self.scored(module, i, layer, at)
            best = score.topk(max(1, int(self.ratio * mass.shape[-1])), -1).indices
            shares.append((mass.gather(-1, best).sum(-1)).mean())
        return {"objective": torch.stack(shares).mean()}

    def scored(self, module: nn.Module, index: int, layer: LayerWindow, at: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and attention mass of the full pages before the queries `at` [Q]: [Q, H, C] each, -inf and 0 behind them."""
        keys, q = layer.k.transpose(0, 1).float(), layer.q[at].unflatten(1, (layer.k.shape[1], -1)).float()  # [H, T, D], [Q, H, G, D]
        count = keys.shape[1] // self.page_size
        pages = keys[:, : count * self.page_size].unflatten(1, (count, self.page_size))
        summary = summarise(pages).expand(len(at), -1, -1, -1)
        visible = (torch.arange(1, count + 1) * self.page_size <= at.unsqueeze(1)).to(keys.device)[:, None, None]
        share = module(index, q, summary, layer.scale).masked_fill(~visible, -1e30).softmax(-1)
        logits = layer.scale * torch.einsum("qhgd,htd->qhgt", q, keys)
        logits = logits.masked_fill((torch.arange(keys.shape[1]) > at.unsqueeze(1)).to(keys.device)[:, None, None], -torch.inf)
        mass = logits.softmax(-1)[..., : count * self.page_size].unflatten(-1, (count, -1)).sum(-1) * visible
        return share.sum(2).clamp_min(1e-20).log(), mass.mean(2)

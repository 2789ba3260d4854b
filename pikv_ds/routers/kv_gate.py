"""KVGate: scores of pages from a query and a summary of each page's keys. Trained by pikv_ds/training/parts/kv_gate.py, run by `learned`.

Q queries, H kv heads, G query heads of each, C pages, P entries of a page, D key width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pikv_ds.codecs.part_file import TrainedLayer


class GateLayer(nn.Module):
    """One layer: log of the attention that a query head gives to a page, were its keys normally distributed, with learned weights."""

    def __init__(self, heads: int, group: int, dim: int) -> None:
        super().__init__()
        self.spread = nn.Parameter(torch.zeros(heads, group, dim))
        self.tilt = nn.Parameter(torch.ones(heads, group, dim))

    def forward(self, q: Tensor, summary: Tensor, scale: float) -> Tensor:
        """q [Q, H, G, D], summary [Q, H, C, 2 D] -> logits [Q, H, G, C]."""
        mean, std = summary.chunk(2, -1)
        center = torch.einsum("qhgd,qhcd->qhgc", q * self.tilt * scale, mean)
        return center + torch.einsum("qhgd,qhcd->qhgc", (scale * q).square() * self.spread.exp() / 2, std.square())


class KVGate(nn.Module):
    """All layers. State: spread and tilt [H, G, D] of each."""

    def __init__(self, layers: Sequence[TrainedLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(GateLayer(x.num_kv_heads, x.num_q_heads // x.num_kv_heads, x.k_dim) for x in layers)

    def forward(self, layer: int, q: Tensor, summary: Tensor, scale: float) -> Tensor:
        return self.layers[layer](q, summary, scale)


def summarise(keys: Tensor) -> Tensor:
    """keys [..., P, D] of full pages -> [..., 2 D]: mean and standard deviation."""
    keys = keys.float()
    return torch.cat([keys.mean(-2), keys.std(-2, correction=0)], -1)

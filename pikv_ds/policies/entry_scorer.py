"""EntryScorer: from an entry's key and value, the attention it will get. Trained as the part eviction_scorer, run by `learned_scores`.

H kv heads, P entries, Dk and Dv their widths, N hidden units.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pikv_ds.codecs.part_file import TrainedLayer

FIRST_SHARE = -4.0
"""Log of the share that an untrained scorer says."""


class ScorerLayer(nn.Module):
    """One layer, a network for each kv head: directions and log norms of key and value -> hidden units -> log of a share."""

    def __init__(self, layer: TrainedLayer, hidden: int) -> None:
        super().__init__()
        heads, width = layer.num_kv_heads, layer.k_dim + layer.v_dim + 2
        self.w1 = nn.Parameter(torch.randn(heads, hidden, width) * (2 / width) ** 0.5)
        self.b1 = nn.Parameter(torch.zeros(heads, hidden))
        self.w2 = nn.Parameter(torch.randn(heads, hidden) * hidden**-0.5)
        self.b2 = nn.Parameter(torch.full((heads,), FIRST_SHARE))

    def forward(self, k: Tensor, v: Tensor, first_head: int) -> Tensor:
        own = slice(first_head, first_head + k.shape[-3])
        x = torch.cat([*_direction(k), *_direction(v)], -1)
        hidden = torch.relu(torch.einsum("...hpw,hnw->...hpn", x, self.w1[own]) + self.b1[own].unsqueeze(-2))
        return torch.einsum("...hpn,hn->...hp", hidden, self.w2[own]) + self.b2[own].unsqueeze(-1)


class EntryScorer(nn.Module):
    """All layers. State: w1 [H, N, Dk + Dv + 2], b1 [H, N], w2 [H, N], b2 [H] of each."""

    def __init__(self, layers: Sequence[TrainedLayer], hidden: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ScorerLayer(layer, hidden) for layer in layers)

    def forward(self, layer: int, k: Tensor, v: Tensor, first_head: int = 0) -> Tensor:
        """k [..., H, P, Dk] after RoPE, v [..., H, P, Dv] -> [..., H, P]: log of the largest share of a query's attention.

        first_head: of the whole model, where these are the heads of a tensor-parallel rank.
        """
        return self.layers[layer](k, v, first_head)


def page_scores(entries: Tensor) -> Tensor:
    """Log shares [..., P] of a page's entries, -inf where none is -> log share of the page [...]."""
    return entries.logsumexp(-1)


def _direction(x: Tensor) -> tuple[Tensor, Tensor]:
    """x / rms(x) [..., D] and log rms(x) [..., 1]."""
    rms = x.square().mean(-1, keepdim=True).clamp_min(1e-12).sqrt()
    return x / rms, rms.log()

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pikv_ds.codecs.weights import read_weights
from pikv_ds.errors import ConfigError
from pikv_ds.policies import POLICIES
from pikv_ds.policies.base import Pages, TokenPolicy
from pikv_ds.spec import LayerSpec

if TYPE_CHECKING:
    from pikv_ds.config.scheduling import SchedulingConfig


@POLICIES.register("quest_mlp")
class LearnedScore(TokenPolicy):
    """Keep the entries that a small network, fitted elsewhere, expects to be attended to, from their own key and value.

    score(entry) = mean over kv heads of w2_h relu(w1_h [k_h, v_h] + b1_h) + b2_h, per layer, k after RoPE; a page has the mean of its
    entries. `path`: safetensors file with w1 [L, H, N, k_dim + v_dim], b1 [L, H, N], w2 [L, H, N], b2 [L, H]: attention layers, kv heads of
    this tensor-parallel rank, hidden units (examples/fit_quest_mlp.py makes one). Reads keys and values back at each eviction, costs no
    KV bytes.

    Source: PiKV, arXiv 2508.06526, table 3, S_QUEST, u_i = MLP([K_i, V_i]), which says nothing of size, activation or training. Quest's own
    bound (arXiv 2406.10774) is `quest`.
    """

    reads_model_queries = True  # its weights are for keys as the model computes them

    def __init__(self, *, path: str) -> None:
        wanted = {"w1": ("L", "H", "N", "k_dim + v_dim"), "b1": ("L", "H", "N"), "w2": ("L", "H", "N"), "b2": ("L", "H")}
        self.path, self.weights = path, {name: tensor.float() for name, tensor in read_weights(path, wanted).items()}

    def check(self, scheduling: SchedulingConfig, layers: list[LayerSpec]) -> None:
        num_layers, num_heads, _, width = self.weights["w1"].shape
        for spec in layers:
            if spec.layer_idx >= num_layers or (spec.num_kv_heads, spec.k_dim + spec.v_dim) != (num_heads, width):
                raise ConfigError(
                    f"pikv.scheduling.path = {self.path!r} holds a network for {num_layers} layers of {num_heads} KV heads with k_dim + "
                    f"v_dim = {width}; layer {spec.layer_idx} of this model has {spec.num_kv_heads} KV heads with "
                    f"{spec.k_dim + spec.v_dim}: use weights fitted for it"
                )

    def entry_scores(self, pages: Pages) -> Tensor:
        x = torch.cat([pages.keys, pages.values], -1)  # [R, S, C, Hkv, page_size, W]
        w1, b1, w2, b2 = (self.weights[name][pages.layer].to(x.device) for name in ("w1", "b1", "w2", "b2"))
        if x.shape[3] < len(w1):  # a page holds one head: the heads of a request are rows
            x = x.squeeze(3).unflatten(0, (-1, len(w1)))  # [R / H, H, S, C, page_size, W]
            return mlp_scores(x.movedim(1, 3), w1, b1, w2, b2).movedim(3, 1).flatten(0, 1)
        return mlp_scores(x, w1, b1, w2, b2).mean(3)


def mlp_scores(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """x [..., H, n, W] of n entries -> [..., H, n]. w1 [..., H, N, W], b1 and w2 [..., H, N], b2 [..., H]; leading dimensions broadcast."""
    hidden = torch.relu(torch.einsum("...hpw,...hnw->...hpn", x, w1) + b1.unsqueeze(-2))
    return torch.einsum("...hpn,...hn->...hp", hidden, w2) + b2.unsqueeze(-1)

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pikv_ds.codecs.part_file import PartFile
from pikv_ds.errors import ConfigError
from pikv_ds.policies import POLICIES
from pikv_ds.policies.base import Pages, RetentionPolicy
from pikv_ds.policies.entry_scorer import EntryScorer, page_scores
from pikv_ds.spec import LayerSpec

if TYPE_CHECKING:
    from pikv_ds.config.scheduling import SchedulingConfig


@POLICIES.register("learned_scores")
class LearnedScores(RetentionPolicy):
    """Keep what the model would look at if it repeated the prompt, as a small network says from keys and values, without a repetition.

    score(page) = sum over its entries of exp(w2_h relu(w1_h [k_h / rms, log rms, v_h / rms, log rms] + b1_h) + b2_h), per layer and kv
    head, k after RoPE; the mean over the heads that share the page. `path`: what `pikv train eviction_scorer` wrote for this model. The
    score is a share of attention, so heads can be compared: head_budget "adaptive" gives the budget to those that copy. Reads keys and
    values back at each eviction, with as many f32 per entry and head as the network has hidden units; costs no KV bytes. `prefill` "keep"
    or "auto" for prompts.

    Source: KVzap (Jegou and Jeblick, arXiv 2601.07891), which regresses KVzip's scores (arXiv 2505.23416) on hidden states; here on what
    is stored, with the target of whole pages.
    """

    reads_model_queries = True  # its weights are for keys as the model computes them

    def __init__(self, *, path: str) -> None:
        self.trained = PartFile.load(path, "eviction_scorer")
        self.scorer = EntryScorer(self.trained.layers, int(self.trained.options["hidden"])).requires_grad_(False)
        self.scorer.load_state_dict(dict(self.trained.weights))
        self.heads = {i: (0, layer.num_kv_heads) for i, layer in enumerate(self.trained.layers)}  # first and number, of this rank

    def check(self, scheduling: SchedulingConfig, layers: list[LayerSpec]) -> None:
        for spec in layers:
            if spec.latent:
                raise ConfigError(
                    f"pikv.scheduling.method = {self.name!r}: layer {spec.layer_idx} stores a latent (MLA), whose keys no part was trained "
                    f"on; use 'keydiff', or 'kvzip' with a rehearsal"
                )
        self.trained.check_layers(layers, "pikv.scheduling.path")
        self.heads = {spec.layer_idx: (spec.first_head, spec.num_kv_heads) for spec in layers}

    def score(self, pages: Pages) -> Tensor:
        keys, values = pages.keys, pages.values  # [R, S, C, Hkv, page_size, D]
        first, count = self.heads[pages.layer]
        apart = keys.shape[3] < count  # a page holds one head: the heads of a request are rows
        if apart:
            keys, values = (x.squeeze(3).unflatten(0, (-1, count)).movedim(1, 3) for x in (keys, values))
        said = self.scorer.to(keys.device)(pages.layer, keys, values, first)
        said = said.movedim(3, 1).flatten(0, 1) if apart else said.movedim(3, 0)  # [R, S, C, page_size], or [Hkv, R, S, C, page_size]
        share = page_scores(torch.where(pages.filled, said, -torch.inf)).exp()
        return share if apart else share.mean(0)

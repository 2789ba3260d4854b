from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from pikv_ds.codecs.weights import read_weights
from pikv_ds.errors import ConfigError
from pikv_ds.policies import POLICIES
from pikv_ds.policies.base import Pages, RetentionPolicy
from pikv_ds.spec import LayerSpec

if TYPE_CHECKING:
    from pikv_ds.config.scheduling import SchedulingConfig

_ABOVE = 1 << 22
"""Above every position that f32 tells apart."""


@POLICIES.register("duo_heads")
class RetrievalHeads(RetentionPolicy):
    """Streaming heads lose everything but sinks and recent entries before a retrieval head loses anything.

    score(page) = position of its last entry, - 2^22 in a streaming head: compared over the heads of a layer, so the budget goes to the
    retrieval heads; when it can't hold all of these, their oldest pages go. A kv head is a retrieval head when its number in the file is at
    least `threshold`. `path`: safetensors file with "heads" [L, H], attention layers and kv heads of this tensor-parallel rank
    (examples/fit_duo_heads.py makes one). Needs head_budget "adaptive" with head_floor 0; a budget of the share of retrieval heads plus
    sinks and window drops nothing else. Costs no memory.

    Source: Xiao et al., DuoAttention, arXiv 2410.10819, section 2. PiKV's S_Duo, attention summed over layers, is `duo`.
    """

    needs_head_budget: ClassVar[str | None] = "adaptive"

    def __init__(self, *, path: str, threshold: float = 0.5) -> None:
        heads = read_weights(path, {"heads": ("num_layers", "num_kv_heads")})["heads"]
        self.path, self.retrieves = path, heads.float() >= threshold

    def check(self, scheduling: SchedulingConfig, layers: list[LayerSpec]) -> None:
        if scheduling.head_floor:
            raise ConfigError(
                f"pikv.scheduling.head_floor = {scheduling.head_floor} with method {self.name!r}: legal is 0, streaming heads keep sinks "
                f"and recent entries only"
            )
        num_layers, num_heads = self.retrieves.shape
        for spec in layers:
            if spec.layer_idx >= num_layers or spec.num_kv_heads != num_heads:
                raise ConfigError(
                    f"pikv.scheduling.path = {self.path!r} names the heads of {num_layers} layers with {num_heads} KV heads; layer "
                    f"{spec.layer_idx} of this model has {spec.num_kv_heads}: use a file made for it"
                )

    def score(self, pages: Pages) -> Tensor:
        retrieves = self.retrieves[pages.layer].to(pages.table.device)
        above = torch.where(retrieves, 0, -_ABOVE).repeat(len(pages.table) // len(retrieves))  # rows are the heads of a request in turn
        return (pages.last_position + above[:, None, None]).float()

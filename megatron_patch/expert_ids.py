"""Expert ids of a forward's entries, from the model's own routers as they run. B rows, T columns."""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds.cache.cache import PiKVCache
from pikv_ds.errors import UnsupportedError
from pikv_ds.placement.placement import hash_expert

from .tokens import Tokens


class ExpertIds:
    """Collects what routers report during one forward and says which ids an attention layer's entries carry.

    previous_layer: the router of the nearest earlier MoE layer; lookahead: the layer's own router on the input of its attention;
    true: the layer's own router, reported to the cache when it has run; hash: position mod E. Where no router has spoken, ids are None
    and the core hashes; a token that all experts dropped is hashed here.
    """

    def __init__(self, source: str, core: PiKVCache, num_experts: int) -> None:
        self.source, self.core, self.num_experts = source, core, num_experts
        self.begin(None)

    def begin(self, tokens: Tokens | None) -> None:
        """A forward starts, or None: there is none whose tensors are to be kept."""
        self._tokens, self._layer = tokens, -1
        self._latest: Tensor | None = None
        self._chunks: list[Tensor] = []

    def of(self, layer: int, looked_ahead: Tensor | None) -> Tensor | None:
        """Ids [B * T] int64 for the entries of the layer whose attention runs now; looked_ahead [tokens], or None. Sync: none."""
        if self._chunks:
            seen = sum(chunk.numel() for chunk in self._chunks)
            raise UnsupportedError(
                f"the router of layer {self._layer} routed {seen} of {self._tokens.num_host_tokens} tokens; PiKV needs all of them on each "
                f"rank"
            )
        if self.source == "lookahead":
            # Before the first layer's record the ranks have not agreed yet on whether they hold the same requests.
            unsettled = layer == 0 and self.core.ranks.size > 1
            return None if looked_ahead is None or unsettled else self._settle(layer, looked_ahead)
        return self._latest if self.source == "previous_layer" else None

    def note(self, layer: int, ids: Tensor) -> bool:
        """One call of a layer's router: ids [tokens] int64, -1 = dropped, in the host's order.

        With mlp_chunks_for_prefill a router is called several times. Returns True once all tokens of the layer are known.
        """
        self._layer = layer
        self._chunks.append(ids)
        expected = self._tokens.num_host_tokens
        seen = sum(chunk.numel() for chunk in self._chunks)
        if seen > expected:
            raise UnsupportedError(f"the router of layer {layer} routed {seen} tokens in a forward of {expected}")
        if seen < expected:
            return False
        ids, self._chunks = torch.cat(self._chunks), []
        if self.source in ("previous_layer", "true"):
            self._latest = self._settle(layer, ids)
        if self.source == "true":
            self.core.name_experts(layer, self._latest)
        return True

    def _settle(self, layer: int, ids: Tensor) -> Tensor:
        """Ids in the host's order -> [B * T], dropped tokens hashed, the same on all ranks that hold the same requests."""
        ids = self._tokens.rows(ids).flatten()
        ids = torch.where(ids < 0, hash_expert(self._tokens.positions.flatten(), self.num_experts), ids)
        if self.core.replicated:
            # A near-tie may fall differently on two ranks, whose tokens sit in other rows of the experts' GEMM; an entry has one home.
            ids = self.core.ranks.all_gather(ids, f"agreeing on the experts of layer {layer}")[0]
        return ids

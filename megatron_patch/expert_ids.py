"""Expert ids of a forward's entries, from the model's own routers as they run. B rows, T columns."""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds.cache import PiKVCache
from pikv_ds.errors import UnsupportedError
from pikv_ds.placement import hash_expert


class ExpertIds:
    """Collects what routers report during one forward and says which ids an attention layer's entries carry.

    previous_layer: the router of the nearest earlier MoE layer; true: the layer's own router, reported to the cache when it has run;
    hash: position mod E. Where no router has spoken, ids are None and the core hashes; a token that all experts dropped is hashed here.
    """

    def __init__(self, source: str, core: PiKVCache, num_experts: int) -> None:
        self.source, self.core, self.num_experts = source, core, num_experts
        self._latest: Tensor | None = None
        self._chunks: list[Tensor] = []
        self._layer = -1

    def begin(self, positions: Tensor) -> None:
        """A forward starts; positions [B, T] int32, -1 = not stored."""
        self._positions, self._latest, self._chunks, self._layer = positions, None, [], -1

    def of(self) -> Tensor | None:
        """Ids [B * T] int64 for the entries of the layer whose attention runs now. Sync: none."""
        if self._chunks:
            seen = sum(chunk.numel() for chunk in self._chunks)
            raise UnsupportedError(f"the router of layer {self._layer} routed {seen} of {self._positions.numel()} tokens; PiKV needs all of them on each rank")
        return self._latest if self.source == "previous_layer" else None

    def note(self, layer: int, ids: Tensor) -> bool:
        """One call of a layer's router: ids [tokens] int64, -1 = dropped, in Megatron's order (column by column of the batch).

        With mlp_chunks_for_prefill a router is called several times. Returns True once all tokens of the layer are known.
        """
        self._layer = layer
        self._chunks.append(ids)
        rows, columns = self._positions.shape
        seen = sum(chunk.numel() for chunk in self._chunks)
        if seen > rows * columns:
            raise UnsupportedError(f"the router of layer {layer} routed {seen} tokens in a forward of {rows} rows x {columns} tokens")
        if seen < rows * columns:
            return False
        ids, self._chunks = torch.cat(self._chunks).view(columns, rows).T.flatten(), []
        ids = torch.where(ids < 0, hash_expert(self._positions.flatten(), self.num_experts), ids)
        if self.core.agreement.mode == "replicated":
            # A near-tie may fall differently on two ranks, whose tokens sit in other rows of the experts' GEMM; an entry has one home.
            ids = self.core.exchange.all_gather(ids, f"agreeing on the experts of layer {layer}")[0]
        self._latest = ids
        if self.source == "true":
            self.core.name_experts(layer, ids)
        return True

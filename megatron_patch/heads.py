"""From the heads of a host's attention to what is stored and back. B rows, T columns, H heads, D head_dim, G ranks, R width of a latent."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pikv_ds.cache.cache import PiKVCache
from pikv_ds.cache.latent import absorb_query, expand_value
from pikv_ds.step.query import Partial

from .groups import Peers
from .layers import is_latent


class OwnHeads:
    """This rank's heads, stored as they are."""

    def __init__(self, attention: nn.Module, core: PiKVCache, layer: int) -> None:
        self.attention, self.core, self.layer, self.spec = attention, core, layer, core.layers[layer]
        self.scale = attention.config.softmax_scale or self.spec.k_dim**-0.5

    def attend(self, q: Tensor, k: Tensor, v: Tensor, latent: Tensor | None, expert_ids: Tensor | None) -> Partial:
        """q [B, T, Hq, D], k and v [B, T, Hkv, D] of this rank -> attention to what is stored, of this rank's query heads."""
        return self._stored(q, k, v, expert_ids)

    def _stored(self, q: Tensor, k: Tensor, v: Tensor, expert_ids: Tensor | None) -> Partial:
        return self.core.attend(self.layer, q, k, v, scale=self.scale, v_dim=self.spec.v_dim, expert_ids=expert_ids)


class SharedHeads(OwnHeads):
    """KV heads that tensor-parallel peers hold in common: stored once for all, so each rank asks for the query heads of all.

    One more collective per layer: the peers' queries (and keys and values, where there are several shared heads).
    """

    def __init__(self, attention: nn.Module, core: PiKVCache, layer: int, peers: Peers) -> None:
        super().__init__(attention, core, layer)
        self.peers = peers

    def attend(self, q: Tensor, k: Tensor, v: Tensor, latent: Tensor | None, expert_ids: Tensor | None) -> Partial:
        num_heads, copies = q.shape[2], self.peers.size // self.spec.num_kv_heads
        if self.spec.num_kv_heads > 1:  # peers hold different heads, each of them several times
            parts = self.gather(torch.cat([q, k, v], 2)).unflatten(2, (self.peers.size, -1))
            q, k, v = parts.split([num_heads, 1, 1], 3)
            q, k, v = q.flatten(2, 3), k[:, :, ::copies, 0], v[:, :, ::copies, 0]
        else:
            q = self.gather(q)
        partial = self._stored(q, k, v, expert_ids)
        own = slice(self.peers.place * num_heads, (self.peers.place + 1) * num_heads)
        return partial._replace(out=partial.out[:, :, own], lse=partial.lse[:, :, own])

    def gather(self, x: Tensor) -> Tensor:
        """[B, T, H, D] -> [B, T, G * H, D], in the order of tensor-parallel ranks."""
        gathered = self.core.ranks.all_gather(x.contiguous(), f"sharing the query heads of layer {self.layer}")
        return gathered[self.peers.order].permute(1, 2, 0, 3, 4).flatten(2, 3)


class LatentHeads:
    """MLA: [c_kv | k_rot] is stored once; the query is absorbed before the exchange, the value expanded after the merge."""

    def __init__(self, attention: nn.Module, store: OwnHeads) -> None:
        self.attention, self.store, self.scale = attention, store, attention.softmax_scale
        store.scale = self.scale

    def attend(self, q: Tensor, k: Tensor, v: Tensor, latent: Tensor, expert_ids: Tensor | None) -> Partial:
        """q, k, v [B, T, H, D] expanded, latent [B, T, R] -> attention in the space of values [B, T, H, Dv]."""
        config = self.attention.config
        up = self.attention.linear_kv_up_proj.weight.detach().view(q.shape[2], -1, config.kv_lora_rank)
        up_k, up_v = up.split([config.qk_head_dim, config.v_head_dim], 1)
        entry = torch.cat([latent, k[:, :, 0, config.qk_head_dim :]], -1).unsqueeze(2)  # every head has the same rotated part
        partial = self.store.attend(absorb_query(q, up_k), entry, entry[..., :0], None, expert_ids)
        return partial._replace(out=expand_value(partial.out, up_v))


def stored_heads(attention: nn.Module, core: PiKVCache, layer: int, peers: Peers | None) -> OwnHeads | LatentHeads:
    store = OwnHeads(attention, core, layer) if peers is None else SharedHeads(attention, core, layer, peers)
    return LatentHeads(attention, store) if is_latent(attention) else store

"""Plain data that describes what one layer of a model stores."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """KV geometry of one attention layer of the whole model (before any tensor-parallel split).

    `window` is the sliding window W in tokens, the query's own token included, or None for full attention.
    `first_head` is the index of the first of these heads among those of the whole model: not 0 on tensor-parallel ranks that split them.
    `softcap` is the c of c tanh(score / c), by which a layer bounds its scores before the softmax, or None.
    `latent` marks MLA: one "head" whose key is [c_kv | k_rot] and whose value is the first v_dim columns of that key.
    """

    layer_idx: int
    num_kv_heads: int
    k_dim: int
    v_dim: int
    window: int | None = None
    latent: bool = False
    first_head: int = 0
    softcap: float | None = None

    @property
    def stored_v_dim(self) -> int:
        """Width of the values stored beside the keys: 0 for a latent layer, whose values are columns of its keys."""
        return 0 if self.latent else self.v_dim

    @property
    def values_per_token(self) -> int:
        """Numbers stored per token; a latent is stored once."""
        return self.num_kv_heads * (self.k_dim + self.stored_v_dim)

    def tokens_kept(self, context: int) -> int:
        """Tokens of a `context` that later queries can still see: W - 1 in a sliding-window layer."""
        return context if self.window is None else min(context, self.window - 1)

    def dense_bytes(self, context: int, itemsize: int) -> int:
        """Bytes of the ordinary cache of one request of `context` tokens, with no unused space."""
        return self.tokens_kept(context) * self.values_per_token * itemsize

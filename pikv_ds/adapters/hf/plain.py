"""Attention of a plain decode step: what a layer does when nothing about it is unusual. B rows, H heads, D head_dim.

Whatever is unusual goes the way of attention.py, which serves or refuses it by name; so nothing is refused here. What is asked of a layer
is asked in the fewest words, as it is asked in every layer of every step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pikv_ds.cache.plain import PlainSteps
from pikv_ds.modes import only_inference
from pikv_ds.spec import LayerSpec

from .arguments import refusable
from .expert_ids import ExpertIds


class PlainLayers:
    """Of one conversation, for as long as it has B rows."""

    def __init__(
        self, steps: PlainSteps, specs: list[LayerSpec], layers: list, expert_ids: ExpertIds, rows: int, dtype: torch.dtype
    ) -> None:
        """layers: of the cache object (cache_layers.py). dtype: of the entries."""
        self._attend, self._layers, self._expert_ids, self.rows, self._dtype = steps.attend, layers, expert_ids, rows, dtype
        # A latent is put together first, and is asked by another query: no shape is right.
        self._k = [None if spec.latent else (rows, spec.num_kv_heads, 1, spec.k_dim) for spec in specs]
        self._v = [None if spec.latent else (rows, spec.num_kv_heads, 1, spec.v_dim) for spec in specs]

    def attend(
        self,
        module: nn.Module,
        layer: int,
        at: int,
        window: int | None,
        windows: set[int | None],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        kwargs: dict,
    ) -> Tensor | None:
        """[B, 1, Hq, Dv] in the dtype of the query. None, with nothing changed: ask attention.py.

        Args: layer and at: of the module (binding.py); window: of the layer, windows: of the masks so far (masks.py). kwargs: what the
            model passes along. Sync: none.
        """
        kept, dtype = self._layers[at], self._dtype
        new = kept.new
        if new is None or new[0] is not key or new[1] is not value or not only_inference():
            return None
        if key.shape != self._k[layer] or value.shape != self._v[layer] or query.shape[2] != 1:
            return None
        if key.dtype != dtype or value.dtype != dtype or query.dtype != dtype:
            return None
        if (len(windows) == 1 and window not in windows) or not refusable(type(module).__module__).isdisjoint(kwargs):
            return None
        q = query.squeeze(2).contiguous()
        scale = q.shape[-1] ** -0.5 if scaling is None else scaling
        k, v = key.squeeze(2).contiguous(), value.squeeze(2).contiguous()
        out = self._attend(layer, q, k, v, scale, self._expert_ids.of(layer, k))
        if out is None:
            return None
        kept.new = None
        return out.unsqueeze(1) if out.dtype == dtype else out.unsqueeze(1).to(dtype)

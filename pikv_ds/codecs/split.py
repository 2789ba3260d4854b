"""One codec for keys, another for values. No method of its own."""

from __future__ import annotations

from dataclasses import replace

from pikv_ds.codecs.base import PoolSpec
from pikv_ds.codecs.maps import Transform, unchanged
from pikv_ds.ops import PageFormat
from pikv_ds.spec import LayerSpec


def split(key: PoolSpec, value: PoolSpec) -> PoolSpec:
    """Keys as the pool `key` of a layer stores them, values as its pool `value` does. Raises: ValueError for a latent."""
    refuse_one_store(key.layer)
    stored = replace(key.layer, k_dim=key.stored.k_dim, v_dim=value.stored.v_dim)
    return replace(key, values=value, stored=stored, transform=lambda: _maps(key, value), record=lambda: _record(key, value, stored))


def refuse_one_store(spec: LayerSpec) -> None:
    """Raises: ValueError for a layer whose keys and values are stored as one."""
    if spec.latent:
        raise ValueError(
            f"layer {spec.layer_idx} stores a latent (MLA): its values are columns of its keys, so pikv.compression.k and .v can't "
            f"differ; give one method"
        )


def _maps(key: PoolSpec, value: PoolSpec) -> Transform | None:
    k, v, layer = key.maps, value.maps, key.layer
    if k is None and v is None:
        return None
    if v is not None and v.inv_freq is not None:
        raise ValueError("rope = 'pre' of the codec of values: only keys are rotated; legal there is 'post'")
    return Transform(
        unchanged(layer.num_kv_heads, layer.k_dim) if k is None else k.k,
        unchanged(layer.num_kv_heads, layer.v_dim) if v is None else v.v,
        None if k is None else k.inv_freq,
    )


def _record(key: PoolSpec, value: PoolSpec, stored: LayerSpec) -> PageFormat:
    for pool in (key, value):
        pool.codec.keeps_rope(pool.layer)  # refuses rope_raw = true, latents are refused above
    options = {"group": key.codec.group} if key.codec.group else {}
    names = {"name": key.codec.format_name(key.dtype), "v_name": value.codec.format_name(value.dtype)}
    dims = {"num_kv_heads": stored.num_kv_heads, "k_dim": stored.k_dim, "v_dim": stored.v_dim}
    return PageFormat(page_size=key.page_size, **dims, **names, **options)

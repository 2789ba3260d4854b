"""A codec on one layer: its maps and its record. Raises: ConfigError that names the layer."""

from __future__ import annotations

from dataclasses import replace

import torch

from pikv_ds.codecs.base import Codec, PoolSpec
from pikv_ds.codecs.table import CodecTable
from pikv_ds.errors import ConfigError
from pikv_ds.ops import PageFormat
from pikv_ds.pages.plan import PoolPlan
from pikv_ds.pools.base import PoolKind
from pikv_ds.spec import LayerSpec


def pool_of(codec: Codec | CodecTable, spec: LayerSpec, page_size: int, dtype: torch.dtype) -> PoolSpec:
    """With its maps made."""
    try:
        pool = codec.pool(spec, page_size, dtype)
        pool.maps  # noqa: B018
        return pool
    except ConfigError:
        raise
    except ValueError as error:
        raise _misfit(codec, spec, error) from None


def page_format(codec: Codec | CodecTable, pool: PoolSpec, heads: int) -> PageFormat:
    """Of a pool of this codec. heads: tables of a row and shard; more than one: a page holds the entries of one head."""
    try:
        return replace(pool.fmt, num_kv_heads=1) if heads > 1 else pool.fmt
    except ValueError as error:
        raise _misfit(codec, pool.layer, error) from None


def pool_behind(key: str, kind: PoolKind, before: PoolPlan, spec: LayerSpec, dtype: torch.dtype) -> PoolPlan:
    """The pool of a kind behind another."""
    try:
        plan = kind.pool(before, spec, dtype)
    except ValueError as error:
        raise ConfigError(f"layer {spec.layer_idx} does not fit pikv.{key}.method = {kind.name!r}: {error}") from None
    if not isinstance(plan, PoolPlan):
        raise ConfigError(f"pikv.{key}.method = {kind.name!r}: {type(kind).__name__}.pool returned {plan!r}; it must return a PoolPlan")
    own, its = ((p.fmt.page_size, p.fmt.num_kv_heads, p.fmt.k_dim, p.fmt.v_dim, p.fmt.latent) for p in (before, plan))
    if own != its or plan.mapped != before.mapped or not plan.always_read:
        raise ConfigError(
            f"pikv.{key}.method = {kind.name!r} gives layer {spec.layer_idx} pages of another shape (page size, heads, widths, latent: "
            f"{its} for {own}), of other maps, or pages that not every query reads: pages only change their record, and PoolKind.pool "
            f"must keep the rest"
        )
    return plan


def _misfit(codec: Codec | CodecTable, spec: LayerSpec, error: ValueError) -> ConfigError:
    return ConfigError(f"layer {spec.layer_idx} does not fit pikv.compression.method = {codec.name!r}: {error}")

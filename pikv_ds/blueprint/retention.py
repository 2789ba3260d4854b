"""What the "scheduling" block cannot do with this model, this storage or these ranks: refused at construction, with the way out."""

from __future__ import annotations

from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.errors import ConfigError
from pikv_ds.policies.base import RetentionPolicy
from pikv_ds.spec import LayerSpec


def check_retention(config: PiKVConfig, policy: RetentionPolicy, layers: list[LayerSpec], num_shards: int) -> None:
    """Raises: ConfigError."""
    if policy.keeps_all:
        return
    method = f"pikv.scheduling.method = {policy.name!r}"
    if all(spec.window is not None for spec in layers):
        raise ConfigError(
            f"{method} on a model whose layers all have a sliding window: nothing would be evicted, windows bound the cache; use 'none'"
        )
    _check_shards(config, policy, num_shards, method)
    if policy.needs_head_budget not in (None, config.scheduling.head_budget):
        raise ConfigError(
            f"pikv.scheduling.head_budget = {config.scheduling.head_budget!r} with {method}: legal is {policy.needs_head_budget!r}"
        )
    if config.scheduling.head_budget != "shared":
        _check_heads(config, policy, layers)
    policy.check(config.scheduling, [spec for spec in layers if spec.window is None])
    if not policy.watches:
        return
    if config.storage.expert_ids == "true":
        raise ConfigError(
            f"pikv.storage.expert_ids = 'true' with {method}: entries are stored after the queries of their forward have read, so the "
            f"attention they get is not known; use 'previous_layer', or a method that looks at positions or keys"
        )


def _check_shards(config: PiKVConfig, policy: RetentionPolicy, num_shards: int, method: str) -> None:
    if policy.needs_one_shard and num_shards > 1:
        raise ConfigError(
            f"{method} with {num_shards} shards (pikv.storage.num_shards, one per rank by default): a score depends on all entries of a "
            f"request; use one shard on one rank, or another method"
        )
    if policy.sums_layers and num_shards > 1 and config.storage.placement != "position":
        raise ConfigError(
            f"{method} with pikv.storage.placement = {config.storage.placement!r} and {num_shards} shards: pages hold other entries in "
            f"each layer, so scores can't be summed over layers; use placement 'position', or one shard"
        )
    if policy.sums_layers and config.scheduling.layer_budget != "uniform":
        raise ConfigError(
            f"pikv.scheduling.layer_budget = {config.scheduling.layer_budget!r} with method {policy.name!r}, which keeps the same entries "
            f"in every layer: legal is 'uniform'"
        )


def _check_heads(config: PiKVConfig, policy: RetentionPolicy, layers: list[LayerSpec]) -> None:
    given = f"pikv.scheduling.head_budget = {config.scheduling.head_budget!r}"
    for spec in layers:
        if spec.latent:
            raise ConfigError(f"{given}, but layer {spec.layer_idx} stores a latent (MLA) that all heads share: legal is 'shared'")
        if spec.window is not None:
            raise ConfigError(f"{given}, but layer {spec.layer_idx} has a sliding window of {spec.window}: legal is 'shared'")
        if spec.num_kv_heads != layers[0].num_kv_heads:
            raise ConfigError(
                f"{given}, but layer {spec.layer_idx} has {spec.num_kv_heads} KV heads and layer {layers[0].layer_idx} "
                f"{layers[0].num_kv_heads}: legal is 'shared'"
            )
    if config.routing.method != "all":
        raise ConfigError(
            f"{given} with pikv.routing.method = {config.routing.method!r}: legal is 'all'; a router scores a page for the heads in it and "
            f"counts its budget in pages that all heads share"
        )
    if policy.target_hit_rate is not None:
        raise ConfigError(f"{given} with the adaptive threshold of method {policy.name!r}: set its rate to 0, or 'shared'")

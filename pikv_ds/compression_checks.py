"""What the "compression" block cannot do with this model, this policy or this router: refused at construction, with the way out."""

from __future__ import annotations

from .codecs.base import Codec
from .config import PiKVConfig
from .errors import ConfigError
from .policies.base import RetentionPolicy
from .spec import LayerSpec
from .transform import Transform


def fit_transforms(codec: Codec, config: PiKVConfig, policy: RetentionPolicy, layers: list[LayerSpec]) -> list[Transform | None]:
    """The maps of every layer. Raises: ConfigError."""
    known = {spec.layer_idx for spec in layers}
    for idx in config.compression.layers or {}:
        if int(idx) not in known:
            raise ConfigError(f"pikv.compression.layers.{idx}: the model has layers 0 to {max(known)}")
    method = f"pikv.compression.method = {codec.name!r}"
    if codec.per_request:
        _check_per_request(config, method)
    transforms = [_transform(codec, spec) for spec in layers]
    if not codec.per_request and all(transform is None for transform in transforms):
        return transforms
    folds = codec.per_request or any(transform is not None and transform.inv_freq is None for transform in transforms)
    if (policy.reads_model_queries and folds) or (codec.per_request and policy.observes_queries):
        raise ConfigError(
            f"pikv.scheduling.method = {policy.name!r} with {method}: it needs the model's own queries, and where projections or rotations "
            f"are folded into them the cache has none; use a record format without rotation ('int8', 'int4'), or another policy"
        )
    if folds and config.routing.build().reads_model_queries:
        raise ConfigError(
            f"pikv.routing.method = {config.routing.method!r} with {method}: its weights were fitted to the model's own queries, and where "
            f"projections or rotations are folded into them the cache has none; use a router of key geometry ('bounds', 'topk')"
        )
    return transforms


def _check_per_request(config: PiKVConfig, method: str) -> None:
    block = config.compression
    for key, given in (("rotate", block.rotate != "none"), ("k", block.k), ("v", block.v), ("layers", block.layers)):
        if given:
            raise ConfigError(f"pikv.compression.{key} with {method}, whose maps belong to a request: it serves all layers, alone")
    if config.routing.method != "all":
        raise ConfigError(
            f"pikv.routing.method = {config.routing.method!r} with {method}: what a router keeps of pages is in the basis in which they "
            f"were stored, and that changes while a request grows; use 'all', or a calibrated codec such as 'lora'"
        )
    if config.scheduling.head_budget != "shared":
        raise ConfigError(
            f"pikv.scheduling.head_budget = {config.scheduling.head_budget!r} with {method}: pages that hold one KV head are not turned "
            f"into a new basis in this version; legal is 'shared'"
        )


def _transform(codec: Codec, spec: LayerSpec) -> Transform | None:
    try:
        codec.stored(spec)
        return codec.transform(spec)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"layer {spec.layer_idx} does not fit pikv.compression.method = {codec.name!r}: {error}") from None

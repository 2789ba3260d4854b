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
    transforms = [_transform(codec, spec) for spec in layers]
    if all(transform is None for transform in transforms):
        return transforms
    method = f"pikv.compression.method = {codec.name!r}"
    if policy.reads_model_queries:
        raise ConfigError(
            f"pikv.scheduling.method = {policy.name!r} with {method}: it needs the model's own queries, and where projections or rotations "
            f"are folded into them the cache has none; use a record format without rotation ('int8', 'int4'), or another policy"
        )
    if config.routing.build().reads_model_queries:
        raise ConfigError(
            f"pikv.routing.method = {config.routing.method!r} with {method}: its weights were fitted to the model's own queries, and where "
            f"projections or rotations are folded into them the cache has none; use a router of key geometry ('bounds', 'topk')"
        )
    return transforms


def _transform(codec: Codec, spec: LayerSpec) -> Transform | None:
    try:
        return codec.transform(spec)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"layer {spec.layer_idx} does not fit pikv.compression.method = {codec.name!r}: {error}") from None

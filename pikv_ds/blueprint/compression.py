"""What the "compression" block cannot do with this model, this policy or this router: refused at construction, with the way out."""

from __future__ import annotations

from pikv_ds.codecs.base import Codec
from pikv_ds.codecs.maps import Transform
from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.errors import ConfigError
from pikv_ds.policies.base import RetentionPolicy
from pikv_ds.routers.base import Router
from pikv_ds.spec import LayerSpec


def fit_transforms(codec: Codec, config: PiKVConfig, policy: RetentionPolicy, layers: list[LayerSpec]) -> list[Transform | None]:
    """The maps of every layer. Raises: ConfigError."""
    known = {spec.layer_idx for spec in layers}
    for idx in config.compression.layers or {}:
        if int(idx) not in known:
            raise ConfigError(f"pikv.compression.layers.{idx}: the model has layers 0 to {max(known)}")
    method = f"pikv.compression.method = {codec.name!r}"
    transforms = [_transform(codec, spec) for spec in layers]
    if not codec.per_request and all(transform is None for transform in transforms):
        return transforms
    folds = codec.per_request or any(transform is not None and transform.inv_freq is None for transform in transforms)
    if codec.per_request and policy.observes_queries and not policy.row_queries and not policy.reads_model_queries:
        raise ConfigError(
            f"pikv.scheduling.method = {policy.name!r} with {method}: it keeps what it was shown of queries per request, and does not say "
            f"which of that to turn when the basis of a request changes (RetentionPolicy.row_queries); use another policy, or 'lora'"
        )
    if folds and policy.reads_model_queries:
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


def check_turning_router(router: Router, *, summarises: bool) -> None:
    """summarises: it keeps something per page. Raises: ConfigError when it can't make that anew for keys in another basis."""
    if summarises and type(router).moved is Router.moved and type(router).turned is Router.turned:
        raise ConfigError(
            f"pikv.routing.method = {router.name!r} with a codec whose bases belong to a request ('svd'): it keeps summaries of pages and "
            f"can't make them anew when a basis changes (Router.turned); use another router, or a calibrated codec such as 'lora'"
        )


def _transform(codec: Codec, spec: LayerSpec) -> Transform | None:
    try:
        codec.stored(spec)
        return codec.transform(spec)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"layer {spec.layer_idx} does not fit pikv.compression.method = {codec.name!r}: {error}") from None

"""From names and options in the "pikv" block to built methods. The only place that builds them: once per call of `Methods.of`."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, NamedTuple, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from pikv_ds.codecs import CODECS
from pikv_ds.codecs.base import Codec
from pikv_ds.codecs.table import CodecTable, Coded, Sides
from pikv_ds.config.block import MethodBlock
from pikv_ds.config.blocks import Blocks
from pikv_ds.config.compression import CodecConfig, CompressionConfig
from pikv_ds.config.wording import gone, illegal, legal_words, unknown
from pikv_ds.errors import ConfigError
from pikv_ds.placement.rules import PLACEMENTS
from pikv_ds.placement.rules.base import PlacementRule
from pikv_ds.policies import POLICIES
from pikv_ds.policies.base import RetentionPolicy
from pikv_ds.policies.h2o import HeavyHitters
from pikv_ds.pools import POOLS
from pikv_ds.pools.base import PoolKind
from pikv_ds.registry import Registry
from pikv_ds.routers import ROUTERS
from pikv_ds.routers.base import Router


class Part(NamedTuple):
    """A codec of the "compression" block by itself, and where it stands."""

    key: str
    block: CodecConfig
    codec: Codec


@dataclass(frozen=True, kw_only=True)
class Methods:
    """What a configuration names, built. A router keeps state, so every cache has methods of its own."""

    router: Router
    policy: RetentionPolicy
    parts: tuple[Part, ...]
    codec: CodecTable
    """Of all layers, keys and values."""
    near: Codec | None
    """Of entries that `codec` has not encoded yet, or never will: raw, or its light one. None = there are none."""
    pools: tuple[PoolKind, ...]
    """Kinds of the pools behind the codec's, in their order."""
    placement: type[PlacementRule]
    """Not built yet: it needs a model and a number of shards."""
    attended: RetentionPolicy | None
    """Whose score says which pages stay near when there is a light codec; the paper leaves the measure open. None = there is none."""

    @classmethod
    def of(cls, config: Blocks) -> Methods:
        """Raises: ConfigError for a name, an option or a file that is not what a method needs."""
        compression, routing, scheduling = config.compression, config.routing, config.scheduling
        placement = _named("storage.placement", config.storage.placement, PLACEMENTS)
        pools = tuple(_built(f"pools[{i}]", block, POOLS) for i, block in enumerate(config.pools))
        router, policy = _built("routing", routing, ROUTERS), _built("scheduling", scheduling, POLICIES)
        parts = _parts(compression)
        for part in parts:
            _refuse_value_error(part.key, part.block, part.codec.ready)
        codec = _joined(compression, parts)
        near = codec.light
        if near is None and (compression.raw_sink_tokens or compression.raw_recent_tokens):
            near = CODECS.build("none")
        attended = None if codec.light is None else HeavyHitters()
        return cls(router=router, policy=policy, parts=parts, codec=codec, near=near, pools=pools, placement=placement, attended=attended)


def codec_of(compression: CompressionConfig) -> CodecTable:
    """The codec of all layers, keys and values, and no other method. Raises: ConfigError."""
    return _joined(compression, _parts(compression))


def check_method(key: str, block: MethodBlock, registry: Registry) -> None:
    """The method of a block is registered, and the block's other keys are options of its constructor with values of their types.

    Raises: ConfigError.
    """
    given, method = block.options, _named(f"{key}.method", block.method, registry)
    parameters = [p for p in inspect.signature(method.__init__).parameters.values() if p.kind is p.KEYWORD_ONLY]
    options = [parameter.name for parameter in parameters]
    for parameter in parameters:
        if parameter.default is parameter.empty and parameter.name not in given:
            raise ConfigError(illegal(f"{key}.{parameter.name}", None, f"a value: method {block.method!r} needs it"))
    types = get_type_hints(method.__init__) if given else {}
    for name, value in given.items():
        if name not in options:
            known = [*type(block).model_fields, *options]
            raise ConfigError(unknown(f"pikv.{key}.{name}", value, f"pikv.{key} with method {block.method!r}", known))
        try:
            TypeAdapter(types[name], config=ConfigDict(strict=True)).validate_python(value)
        except ValidationError:
            raise ConfigError(illegal(f"{key}.{name}", value, legal_words(types[name]))) from None


def _named(key: str, name: str, registry: Registry) -> type[Any]:
    """The class of that name. Raises: ConfigError."""
    if name in registry.removed:
        raise ConfigError(gone(key, name, registry.removed[name]))
    if name not in registry.names():
        legal = f"one of {', '.join(map(repr, registry.names()))}"
        if not registry.names():
            legal = "what an installed distribution brings under the entry-point group 'pikv_ds.methods', and there is none"
        raise ConfigError(illegal(key, name, legal))
    return registry.get(name)


def _built(key: str, block: MethodBlock, registry: Registry) -> Any:
    check_method(key, block, registry)
    return _refuse_value_error(key, block, lambda: registry.build(block.method, **block.options))


def _refuse_value_error(key: str, block: MethodBlock, call) -> Any:
    try:
        return call()
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(illegal(key, {"method": block.method, **block.options}, str(error))) from None


def _parts(compression: CompressionConfig) -> tuple[Part, ...]:
    return tuple(Part(key, block, _built(key, block, CODECS)) for key, block in compression.parts("compression"))


def _joined(compression: CompressionConfig, parts: tuple[Part, ...]) -> CodecTable:
    coded = {key: Coded(codec, None if block.rotate == "none" else block.rotate_seed) for key, block, codec in parts}
    others = {int(idx): _sides(f"compression.layers.{idx}", coded) for idx in compression.layers or {}}
    return CodecTable(_sides("compression", coded), others)


def _sides(key: str, coded: dict[str, Coded]) -> Sides:
    """Those of one block."""
    return Sides(coded.get(f"{key}.k", coded[key]), coded.get(f"{key}.v", coded[key]))

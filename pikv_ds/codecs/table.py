"""Which codec stores the keys and which the values of every layer, as built from a configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from pikv_ds.codecs.base import Codec, PoolSpec
from pikv_ds.codecs.rotated import rotated
from pikv_ds.codecs.split import refuse_one_store, split
from pikv_ds.spec import LayerSpec


class Coded(NamedTuple):
    """A codec, and the rotation before it."""

    codec: Codec
    seed: int | None = None
    """Of the rotation; None = there is none."""

    def pool(self, spec: LayerSpec, page_size: int, dtype: torch.dtype) -> PoolSpec:
        pool = self.codec.pool(spec, page_size, dtype)
        return pool if self.seed is None else rotated(pool, self.seed)


class Sides(NamedTuple):
    """Of keys and of values; one codec for both is the same object twice."""

    k: Coded
    v: Coded

    @property
    def codecs(self) -> tuple[Codec, ...]:
        return (self.k.codec,) if self.k is self.v else (self.k.codec, self.v.codec)


@dataclass(frozen=True)
class CodecTable:
    """Stands for the codec of all layers. What a layer's pages are is asked of `pool`; what is one codec's own, of that codec."""

    default: Sides
    others: dict[int, Sides] = field(default_factory=dict)
    """By layer_idx, in place of `default`."""

    def of(self, spec: LayerSpec) -> Sides:
        return self.others.get(spec.layer_idx, self.default)

    def pool(self, spec: LayerSpec, page_size: int, dtype: torch.dtype) -> PoolSpec:
        """How pages of this layer store it. Raises: ValueError, ConfigError."""
        k, v = self.of(spec)
        if k is v:
            return k.pool(spec, page_size, dtype)
        refuse_one_store(spec)  # before either codec is asked
        return split(k.pool(spec, page_size, dtype), v.pool(spec, page_size, dtype))

    def page_size(self, wanted: int | None) -> int:
        """Tokens per page: what the configuration says, or what suits all. Raises: ValueError when a page holds no whole groups."""
        if self.only is not None:
            return self.only.page_size(wanted)
        wanted = wanted or common_page_size([_paged(sides) for sides in self._all])
        return [sides.k.codec.page_size(wanted) for sides in self._all][0]  # only keys share scales over tokens

    def check_model(self, spec: LayerSpec, norms: Tensor) -> None:
        """Raises: ConfigError when a calibration of this layer is of other weights, see Codec.check_model."""
        for codec in self.of(spec).codecs:
            codec.check_model(spec, norms)

    @property
    def name(self) -> str:
        """For messages."""
        return " + ".join(dict.fromkeys(codec.name for codec in self.default.codecs))

    @property
    def only(self) -> Codec | None:
        """The codec of all layers, keys and values; None: there are several. Only such a one can have a light one, or fit requests."""
        return self.default.k.codec if self.default.k is self.default.v and not self.others else None

    @property
    def light(self) -> Codec | None:
        return None if self.only is None else self.only.light

    @property
    def per_request(self) -> bool:
        return self.only is not None and self.only.per_request

    @property
    def calibrated(self) -> bool:
        """Some layer's keys or values need a calibration."""
        return any(codec.calibrated for sides in self._all for codec in sides.codecs)

    @property
    def _all(self) -> list[Sides]:
        return [self.default, *self.others.values()]


class Paged(NamedTuple):
    """What a page should hold: tokens, and whole groups of so many; 0 = there are no groups."""

    tokens: int
    group: int


def _paged(sides: Sides) -> Paged:
    wanted = [Paged(codec.preferred_page_size, codec.group) for codec in sides.codecs]
    return wanted[0] if len(wanted) == 1 else Paged(common_page_size(wanted), wanted[0].group)


def common_page_size(wanted: list[Paged]) -> int:
    """Tokens per page that suit all of them: the largest preference, or the least multiple of all groups if that holds no whole ones."""
    tokens = max(own.tokens for own in wanted)
    groups = math.lcm(*(own.group for own in wanted if own.group))
    return tokens if tokens % groups == 0 else groups

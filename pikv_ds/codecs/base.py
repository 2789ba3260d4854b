"""Codec: in which format the pages of a layer store its keys and values. PoolSpec: what that comes to for one layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from pikv_ds.codecs.maps import Transform
from pikv_ds.ops.format.formats import PageFormat
from pikv_ds.spec import LayerSpec


class Heads(NamedTuple):
    """What one layer computes for N tokens: q [N, Hq, Dk], k [N, H, Dk], v [N, H, Dv], after RoPE."""

    q: Tensor
    k: Tensor
    v: Tensor


class RequestFit(NamedTuple):
    """How the maps of a layer are fitted to each request (pikv_ds/tiers/bases.py)."""

    tokens: int
    """Of a request, up to which they are fitted again."""
    rotation: tuple[Tensor, Tensor] | None = None
    """What coefficients of keys and of values are rotated by, [H, r, r] f32 each; None: nothing."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PoolSpec:
    """How pages store one layer. What rotates it (rotated.py) or joins two (split.py) makes another with `replace`: what it does not name
    stays, a field that is added here as well as an attribute of the codec."""

    codec: Codec
    """As configured; of the keys, where the values have another."""
    layer: LayerSpec
    page_size: int
    dtype: torch.dtype
    """Of the model's keys."""
    stored: LayerSpec
    """The geometry of what pages hold."""
    transform: Callable[[], Transform | None]
    """Makes `maps`, when they are asked for."""
    record: Callable[[], PageFormat]
    """Makes `fmt`, when it is asked for: a codec of keys alone need not have a record for the layer's values."""
    fitted: RequestFit | None = None
    """Of a codec that fits each request."""
    rounding: float = 0.0
    """Relative error of numbers that are rounded between the model's heads and the codec's own maps."""
    values: PoolSpec | None = None
    """Of the codec that stores the values; None: `codec` stores both."""

    @cached_property
    def maps(self) -> Transform | None:
        """Between the model's heads and what pages hold; None: they are the same, or maps belong to requests.

        Raises: ValueError, ConfigError.
        """
        return self.transform()

    @cached_property
    def fmt(self) -> PageFormat:
        """Layout of one page. Raises: ValueError for a geometry without a record."""
        return self.record()

    @property
    def light(self) -> PoolSpec | None:
        """Of new and of important entries, when the codec keeps two kinds of pages; its entries are mapped as the others are."""
        if self.codec.light is None or self.values is not None:
            return None
        return replace(self.codec.light.pool(self.layer, self.page_size, self.dtype), transform=lambda: self.maps, rounding=self.rounding)

    @property
    def request_bytes(self) -> int:
        """Bytes that a request takes besides its pages, at the rank that runs it."""
        return self.codec.request_bytes(self.layer) + (0 if self.values is None else self.values.request_bytes)

    @property
    def declared_errors(self) -> tuple[float, float]:
        """Largest ||x - x_hat|| / ||x|| of the keys and of the values, see Codec.declared_errors."""
        k, v = (error + self.rounding for error in self.codec.declared_errors(self.layer, self.page_size, self.dtype))
        return k, v if self.values is None else self.values.declared_errors[1]


class Codec(ABC):
    """Format of the keys and values of the layers.

    Options of a codec are keyword-only constructor arguments with defaults; they are keys of the "compression" block. The docstring of a
    codec gives its formula, its source and its bytes per token and layer.
    """

    name: ClassVar[str]
    lossless: ClassVar[bool] = False
    calibrated: ClassVar[bool] = False
    """Whether it needs a file of statistics, its option `calibration` (pikv_ds/codecs/calibration.py)."""
    per_request: ClassVar[bool] = False
    """Whether its maps follow from each request's own keys and values (pikv_ds/tiers/bases.py); `transform` is None then."""
    fit_tokens: int = 0
    """With per_request: tokens of a request up to which its maps are fitted again; 0 = they never are."""
    group: int = 0
    """Tokens that share a scale of K, so that a page must hold whole groups and a row keeps a raw tail; 0 = none do."""
    rope_raw: bool | None = False
    """Whether the rotary columns of an MLA latent, its last k_dim - v_dim, stay fp16 beside the codes; None: wherever a layer has some."""
    light: Codec | None = None
    """The codec of new and of important entries, when the codec keeps two kinds of pages (tiers/window.py)."""
    light_ratio: float = 0.0
    """Share of a request's entries that may stay in the light codec."""

    @classmethod
    def example(cls, samples: Sequence[Heads]) -> Self:
        """An instance with default options, calibrated on the heads of layers 0, 1, ... if it must be: for tables and tests."""
        return cls()

    @property
    @abstractmethod
    def preferred_page_size(self) -> int:
        """Tokens per page when the configuration says null."""

    @abstractmethod
    def format_name(self, dtype: torch.dtype) -> str:
        """The record format (ops/format/formats.py) for keys of this dtype. Raises: ValueError for a dtype it cannot hold."""

    def pool(self, spec: LayerSpec, page_size: int, dtype: torch.dtype) -> PoolSpec:
        """How pages of this layer store it, from the methods below. Raises: ValueError, ConfigError, for its geometry."""
        return PoolSpec(
            codec=self, layer=spec, page_size=page_size, dtype=dtype, stored=self.stored(spec), transform=partial(self.transform, spec),
            record=partial(self.page_format, spec, page_size, dtype), fitted=RequestFit(self.fit_tokens) if self.per_request else None,
        )  # fmt: skip

    def ready(self) -> None:  # noqa: B027
        """Read what the codec needs from disk. Raises: ValueError when that is missing or of something else."""

    def stored(self, spec: LayerSpec) -> LayerSpec:
        """The geometry of what pages hold of a layer: narrower than the model's for codecs that store coefficients."""
        return spec

    def transform(self, spec: LayerSpec) -> Transform | None:
        """The maps between the model's heads and what pages hold; None: they are the same. Raises: ValueError, ConfigError."""
        return None

    def request_maps(self, spec: LayerSpec, heads: Heads) -> Transform | None:
        """The maps for a request that computes just these heads: `transform`, but for codecs that fit each request."""
        return self.transform(spec)

    def request_bytes(self, spec: LayerSpec) -> int:
        """Bytes that a request takes in a layer besides its pages, at the rank that runs it."""
        return 0

    def check_model(self, spec: LayerSpec, norms: Tensor) -> None:  # noqa: B027
        """Raises: ConfigError when a calibration is of other weights; norms [H, D]: of the rows of the layer's key projection."""

    def declared_errors(self, spec: LayerSpec, page_size: int, dtype: torch.dtype) -> tuple[float, float]:
        """Largest ||x - x_hat|| / ||x|| of the keys and of the values of a layer; of the calibration's own ones for calibrated codecs."""
        fmt = self.page_format(spec, page_size, dtype)
        return (0.0, 0.0) if self.lossless else (fmt.k_rel_error, fmt.v_rel_error)

    def page_format(self, spec: LayerSpec, page_size: int, dtype: torch.dtype) -> PageFormat:
        """Layout of one page of this layer; its bytes, and the errors of its record, `k_rel_error` and `v_rel_error`.

        Raises: ValueError for a geometry without a record: a width that is not a multiple of 8, a page that is not whole groups.
        """
        options = {"group": self.group} if self.group else {}
        options |= {"latent": spec.latent, "rope_raw": self.keeps_rope(spec)}
        spec = self.stored(spec)
        return PageFormat(self.format_name(dtype), spec.num_kv_heads, spec.k_dim, spec.v_dim, page_size, **options)

    def keeps_rope(self, spec: LayerSpec) -> bool:
        """`rope_raw` for this layer. Raises: ValueError when it is asked for and there is no rotary part."""
        has_rope = spec.latent and spec.k_dim > spec.v_dim
        if self.rope_raw and not has_rope:
            what = "a latent without a rotary part" if spec.latent else "keys and values of heads, not a latent (MLA)"
            raise ValueError(f"rope_raw = true, and the layer stores {what}; legal is null, which means true for latents alone, or false")
        return has_rope if self.rope_raw is None else self.rope_raw

    def page_size(self, wanted: int | None) -> int:
        """Tokens per page: what the configuration says, or what the codec prefers. Raises: ValueError when that holds no whole groups."""
        page_size = wanted or self.preferred_page_size
        if self.group and page_size % self.group:
            raise ValueError(
                f"a multiple of {self.group} with pikv.compression.method = {self.name!r}, whose K scales serve {self.group} tokens; "
                f"or null, which is {self.preferred_page_size}"
            )
        return page_size

"""One codec for keys, another for values; and another codec for some layers. No methods of their own."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from pikv_ds.codecs.base import Codec
from pikv_ds.codecs.maps import Transform, unchanged
from pikv_ds.ops import PageFormat
from pikv_ds.spec import LayerSpec


class KVSplit(Codec):
    """Keys as codec `k` stores them, values as codec `v` does."""

    def __init__(self, k: Codec, v: Codec) -> None:
        self.k, self.v = k, v
        self.name = k.name if k.name == v.name else f"{k.name} + {v.name}"
        self.lossless, self.calibrated, self.group = k.lossless and v.lossless, k.calibrated or v.calibrated, k.group

    @property
    def preferred_page_size(self) -> int:
        return common_page_size([self.k, self.v])

    def page_size(self, wanted: int | None) -> int:
        return self.k.page_size(wanted or self.preferred_page_size)

    def format_name(self, dtype: torch.dtype) -> str:
        return self.k.format_name(dtype)

    def ready(self) -> None:
        self.k.ready()
        self.v.ready()

    def stored(self, spec: LayerSpec) -> LayerSpec:
        if spec.latent:
            raise ValueError(
                f"layer {spec.layer_idx} stores a latent (MLA): its values are columns of its keys, so pikv.compression.k and .v can't "
                f"differ; give one method"
            )
        return replace(spec, k_dim=self.k.stored(spec).k_dim, v_dim=self.v.stored(spec).v_dim)

    def transform(self, spec: LayerSpec) -> Transform | None:
        k, v = self.k.transform(spec), self.v.transform(spec)
        if k is None and v is None:
            return None
        if v is not None and v.inv_freq is not None:
            raise ValueError("rope = 'pre' of the codec of values: only keys are rotated; legal there is 'post'")
        return Transform(
            unchanged(spec.num_kv_heads, spec.k_dim) if k is None else k.k,
            unchanged(spec.num_kv_heads, spec.v_dim) if v is None else v.v,
            None if k is None else k.inv_freq,
        )

    def check_model(self, spec: LayerSpec, norms: Tensor) -> None:
        self.k.check_model(spec, norms)
        self.v.check_model(spec, norms)

    def declared_errors(self, spec: LayerSpec, page_size: int, dtype: torch.dtype) -> tuple[float, float]:
        return self.k.declared_errors(spec, page_size, dtype)[0], self.v.declared_errors(spec, page_size, dtype)[1]

    def page_format(self, spec: LayerSpec, page_size: int, dtype: torch.dtype) -> PageFormat:
        options, stored = {"group": self.group} if self.group else {}, self.stored(spec)
        for codec in (self.k, self.v):
            codec.keeps_rope(spec)  # refuses rope_raw = true, latents are refused above
        names = {"name": self.k.format_name(dtype), "v_name": self.v.format_name(dtype)}
        return PageFormat(num_kv_heads=spec.num_kv_heads, k_dim=stored.k_dim, v_dim=stored.v_dim, page_size=page_size, **names, **options)


class PerLayer(Codec):
    """Codec `default`, but for the layers of `others`."""

    def __init__(self, default: Codec, others: dict[int, Codec]) -> None:
        self.default, self.others = default, others
        self.name, self.lossless = default.name, all(codec.lossless for codec in self._all)
        self.calibrated = any(codec.calibrated for codec in self._all)

    @property
    def _all(self) -> list[Codec]:
        return [self.default, *self.others.values()]

    def of(self, spec: LayerSpec) -> Codec:
        return self.others.get(spec.layer_idx, self.default)

    @property
    def preferred_page_size(self) -> int:
        return common_page_size(self._all)

    def page_size(self, wanted: int | None) -> int:
        wanted = wanted or self.preferred_page_size
        return [codec.page_size(wanted) for codec in self._all][0]

    def format_name(self, dtype: torch.dtype) -> str:
        return self.default.format_name(dtype)

    def ready(self) -> None:
        for codec in self._all:
            codec.ready()

    def stored(self, spec: LayerSpec) -> LayerSpec:
        return self.of(spec).stored(spec)

    def transform(self, spec: LayerSpec) -> Transform | None:
        return self.of(spec).transform(spec)

    def check_model(self, spec: LayerSpec, norms: Tensor) -> None:
        self.of(spec).check_model(spec, norms)

    def declared_errors(self, spec: LayerSpec, page_size: int, dtype: torch.dtype) -> tuple[float, float]:
        return self.of(spec).declared_errors(spec, page_size, dtype)

    def page_format(self, spec: LayerSpec, page_size: int, dtype: torch.dtype) -> PageFormat:
        return self.of(spec).page_format(spec, page_size, dtype)


def common_page_size(codecs: list[Codec]) -> int:
    """Tokens per page that suit all of them: the largest preference, or the least multiple of all groups if that holds no whole ones."""
    wanted = max(codec.preferred_page_size for codec in codecs)
    groups = math.lcm(*(codec.group for codec in codecs if codec.group))
    return wanted if wanted % groups == 0 else groups

"""What codecs that store r coefficients in place of a key or a value share: options, the calibration, the declared error.

D head_dim, r rank, H kv heads. A codec says only how its maps follow from the moments of keys or values.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from pikv_ds.codecs import CODECS
from pikv_ds.codecs import calibration as calibrations
from pikv_ds.codecs.base import Codec, Heads
from pikv_ds.codecs.calibration import Calibration, Moments
from pikv_ds.codecs.maps import Linear, Transform
from pikv_ds.spec import LayerSpec


class LinearCodec(Codec):
    """Stores coefficients of width `rank` in the record format of another codec, `store` ("none": the model's dtype).

    The maps are folded into queries and outputs (maps.py): pages are read by the compiled ops of `store`, r / D of the bytes.
    rope "pre": coefficients are of keys before their rotation, which has a lower rank to it (ShadowKV, arXiv 2410.21465; KVQuant, arXiv
    2401.18079) but can't be folded: pages are decoded in torch, and attention, policies and routers meet keys that are put together
    again (pikv_ds/pages/unrotated.py).
    """

    calibrated = True
    learns: ClassVar[bool] = False
    """Whether the calibration also holds what `learn` trains."""

    def __init__(
        self, *, rank: int, calibration: str, store: str = "none", group: int | None = None, rope: Literal["post", "pre"] = "post"
    ) -> None:
        check_rank(rank)
        self.unrotated = rope == "pre"
        self.rank, self.path, self.record = rank, calibration, record_codec(store, group)
        self.group = self.record.group
        self._calibration: Calibration | None = None
        self._transforms: dict[LayerSpec, Transform] = {}

    @abstractmethod
    def fit(self, moments: Moments, rank: int) -> Linear:
        """The maps of one layer's keys or values, f64 or f32."""

    @classmethod
    def on(cls, calibration: Calibration, **options) -> Self:
        """A codec on statistics in memory."""
        codec = cls(calibration="(in memory)", **options)
        codec._calibration = calibration
        return codec

    @classmethod
    def example(cls, samples: Sequence[Heads]) -> Self:
        """At half the width."""
        moments = [(Moments.of(heads.k, heads.q), Moments.of(heads.v)) for heads in samples]
        width = min(min(heads.k.shape[-1], heads.v.shape[-1]) for heads in samples)
        return cls.on(Calibration.of(moments), rank=max(8, width // 16 * 8))

    # ---- the record ----------------------------------------------------------------------------------------------------------

    @property
    def preferred_page_size(self) -> int:
        return self.record.preferred_page_size

    def format_name(self, dtype: torch.dtype) -> str:
        return self.record.format_name(dtype)

    # ---- the maps ------------------------------------------------------------------------------------------------------------

    def ready(self) -> None:
        if self._calibration is None:
            self._calibration = calibrations.load(self.path)

    @property
    def calibration(self) -> Calibration:
        self.ready()
        return self._calibration

    def check_model(self, spec: LayerSpec, norms: Tensor) -> None:
        self.calibration.check_model(spec, norms, self.path)

    def stored(self, spec: LayerSpec) -> LayerSpec:
        refuse_latent(self.name, spec)
        maps = self.transform(spec)
        return replace(spec, k_dim=maps.k.rank, v_dim=maps.v.rank)

    def transform(self, spec: LayerSpec) -> Transform:
        if spec not in self._transforms:
            refuse_latent(self.name, spec)
            self.calibration.check_geometry(spec, self.path)
            if self.unrotated:
                self.calibration.check_unrotated(spec, self.path)
            for what, dim in (("k_dim", spec.k_dim), ("v_dim", spec.v_dim)):
                if self.rank > dim:
                    raise ValueError(f"rank = {self.rank} is larger than {what} = {dim} (head_dim): legal is a multiple of 8 up to {dim}")
            self._transforms[spec] = self.maps(spec)
        return self._transforms[spec]

    def maps(self, spec: LayerSpec) -> Transform:
        """The maps of one layer, f32."""
        found = (self.fit(self.keys(spec), self.rank), self.fit(self.calibration.values(spec), self.rank))
        inv_freq = self.calibration.inv_freq(spec) if self.unrotated else None
        return Transform(*(linear.to(torch.device("cpu")) for linear in found), inv_freq)

    def keys(self, spec: LayerSpec) -> Moments:
        """Of the keys that the maps are of."""
        return self.calibration.unrotated_keys(spec) if self.unrotated else self.calibration.keys(spec)

    def declared_errors(self, spec: LayerSpec, page_size: int, dtype: torch.dtype) -> tuple[float, float]:
        """sqrt(E||x - x_hat||^2 / E||x||^2) over the calibration's keys (values) before rounding, plus what the record adds at most."""
        maps, fmt, rounding = self.transform(spec), self.page_format(spec, page_size, dtype), torch.finfo(dtype).eps
        sides = (
            (self.keys(spec), maps.k, fmt.k_rel_error + rounding),
            (self.calibration.values(spec), maps.v, fmt.v_rel_error + rounding),
        )
        return tuple(_declared(moments, linear, record) for moments, linear, record in sides)


def squared_error(moments: Moments, linear: Linear) -> Tensor:
    """E||x - x_hat||^2 of every head, [H] f64: tr((I - E U)^T S (I - E U)), S the second moment about the map's mean."""
    residual = torch.eye(linear.encode.shape[1], dtype=torch.float64) - linear.encode.double() @ linear.decode.double()
    return torch.einsum("hij,hik,hkj->h", residual, _about(moments, linear), residual)


def lost_share(moments: Moments, linear: Linear) -> float:
    """E||x - x_hat||^2 / E||x||^2, all heads together."""
    return float(squared_error(moments, linear).sum().clamp_min(0) / moments.energy.sum())


def _declared(moments: Moments, linear: Linear, record: float) -> float:
    encode = linear.encode.double()
    coefficients = torch.einsum("hir,hij,hjr->h", encode, _about(moments, linear), encode).sum()  # E||c||^2, all heads
    stretch = torch.linalg.matrix_norm(linear.decode.double(), 2).max()
    energy = moments.energy.sum()
    return float(lost_share(moments, linear) ** 0.5 + record * stretch * (coefficients / energy).sqrt())


def _about(moments: Moments, linear: Linear) -> Tensor:
    """E[(x - m)(x - m)^T], [H, D, D] f64, m the map's mean."""
    if linear.mean is None:
        return moments.second
    away = moments.mean - linear.mean.double()
    return moments.covariance + away.unsqueeze(-1) * away.unsqueeze(-2)


def top_directions(second: Tensor, rank: int, metric: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Encode [H, D, r] and decode [H, r, D] f64 that lose least of vectors with this second moment [H, D, D].

    What is lost is E||x - x_hat||^2, minimal for the first eigenvectors (Eckart and Young, 1936); with a metric M [H, D, D] it is
    E[(x - x_hat)^T M (x - x_hat)], for keys E[(q . k - q . k_hat)^2] of queries that do not depend on k: the eigenvectors of
    M^1/2 second M^1/2, mapped back.
    """
    if metric is None:
        basis = _leading(second, rank)
        return basis, basis.mT
    values, vectors = torch.linalg.eigh(metric)
    # Directions in which no query ever points still get a little weight, so that the root can be inverted.
    root_values = values.clamp_min(values[..., -1:] * 1e-6).sqrt()
    root = vectors * root_values.unsqueeze(-2) @ vectors.mT
    inverse = vectors / root_values.unsqueeze(-2) @ vectors.mT
    basis = _leading(root @ second @ root, rank)
    return root @ basis, basis.mT @ inverse


def _leading(symmetric: Tensor, rank: int) -> Tensor:
    """The first `rank` eigenvectors [H, D, r], largest eigenvalue first, each with its largest element positive: the same on all ranks."""
    vectors = torch.linalg.eigh(symmetric)[1].flip(-1)[..., :rank]
    sign = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True)).sign()
    return vectors * sign


def check_rank(rank: int) -> None:
    if rank < 8 or rank % 8:
        raise ValueError(f"rank = a multiple of 8 from 8 to head_dim, got {rank}: records hold rows of whole 8 elements")


def record_codec(store: str, group: int | None) -> Codec:
    """The codec whose record format holds the coefficients."""
    # Not what is fitted to something itself, nor what keeps two kinds of pages.
    formats = [name for name, codec in CODECS.items() if not codec.calibrated and not codec.per_request]
    legal = sorted(name for name in formats if CODECS.build(name).light is None)
    if store not in legal:
        raise ValueError(f"store = one of {', '.join(map(repr, legal))}, got {store!r}: a format for the coefficients")
    if group is None:
        return CODECS.build(store)
    if not CODECS.build(store).group:
        raise ValueError(f"group = null with store {store!r}, which shares no scale over tokens, got {group}")
    return CODECS.build(store, group=group)


def refuse_latent(name: str, spec: LayerSpec) -> None:
    if spec.latent:
        raise ValueError(
            f"layer {spec.layer_idx} stores a latent (MLA), which is a low-rank code already and whose first {spec.v_dim} columns must "
            f"stay its values: legal are formats of the record such as 'int8', not {name!r}"
        )

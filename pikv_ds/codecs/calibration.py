"""Statistics of a model's keys, values and queries, in a safetensors file that `pikv calibrate` writes and calibrated codecs read.

L layers, H kv heads, D head_dim. Keys and queries are post-RoPE. f32, summed in f64. Per layer i:

    i.k_mean, i.v_mean        [H, D]
    i.k_second, i.v_second    [H, D, D]  E[x x^T]
    i.q_second                [H, D, D]  E[q q^T] over the query heads of a kv head: E[(q . e)^2] = e^T q_second e
    i.o_second                [H, D, D]  mean of W^T W over the blocks W of the output projection that its values meet: ||W e||^2
    i.fingerprint             [H, D]     norms of the rows of its key projection

and of the same keys before their rotation (codecs/rope.py), if the model's is one by halves over the whole width:

    i.inv_freq                [D / 2]
    i.k_pre_mean, i.k_pre_second
    i.q_pre_second            [H, D, D]  rope.pair_metric per pair: what q_second is to keys that are rotated after the error is made

Codecs that are trained add tensors of their own.

Fingerprint: the geometry must be the same and the norms equal within FINGERPRINT_TOLERANCE. It is not a hash, because the same weights in
bf16 and in fp32 are the same model, and because each tensor-parallel rank must be able to check its own heads alone.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pikv_ds.errors import ConfigError
from pikv_ds.spec import LayerSpec

from .weights import not_finite, read_file

VERSION = "1"
FINGERPRINT_TOLERANCE = 0.01  # bf16 rounds an element by 2^-9 at most, a norm by less
_PARTS = ("k_mean", "k_second", "q_second", "v_mean", "v_second", "o_second")


class Moments(NamedTuple):
    """Of the keys or values of one layer, f64: mean [H, D], second [H, D, D] = E[x x^T]; metric [H, D, D]: in attention an error e weighs
    e^T metric e (q_second, o_second), None = not known."""

    mean: Tensor
    second: Tensor
    metric: Tensor | None = None

    @property
    def covariance(self) -> Tensor:
        return self.second - self.mean.unsqueeze(-1) * self.mean.unsqueeze(-2)

    @property
    def energy(self) -> Tensor:
        """E[||x||^2] of every head, [H]."""
        return self.second.diagonal(dim1=-2, dim2=-1).sum(-1)

    @classmethod
    def of(cls, x: Tensor, q: Tensor | None = None) -> Moments:
        """Of x [N, H, D], and of queries q [N, Hq, D]."""
        x = x.double()
        metric = None
        if q is not None:
            by_head = q.double().unflatten(1, (x.shape[1], -1))
            metric = torch.einsum("nhgi,nhgj->hij", by_head, by_head) / (by_head.shape[0] * by_head.shape[2])
        return cls(x.mean(0), torch.einsum("nhi,nhj->hij", x, x) / len(x), metric)


class Calibration:
    """What a calibration file holds. `tensors` as in the module's docstring; `about`: where it comes from, strings."""

    def __init__(self, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
        self.tensors, self.about = tensors, about

    @classmethod
    def of(
        cls, layers: list[tuple[Moments, Moments]], *, fingerprint: list[Tensor] | None = None, about: dict[str, str] | None = None
    ) -> Calibration:
        """From the moments of keys and of values of every layer; fingerprint: [H, D] each, or None for keys that are of no model."""
        tensors = {}
        for i, (k, v) in enumerate(layers):
            parts = (*k, *v)
            tensors |= {f"{i}.{name}": x.to(torch.float32).contiguous() for name, x in zip(_PARTS, parts, strict=True) if x is not None}
            if fingerprint is not None:
                tensors[f"{i}.fingerprint"] = fingerprint[i].to(torch.float32).contiguous()
        return cls(tensors, {"format": f"pikv calibration {VERSION}", "num_layers": str(len(layers)), **(about or {})})

    @property
    def num_layers(self) -> int:
        return int(self.about["num_layers"])

    def add_unrotated(self, layer: int, keys: Moments, inv_freq: Tensor) -> None:
        """Keep what is known of a layer's keys before the rotation inv_freq [D / 2]."""
        parts = {"k_pre_mean": keys.mean, "k_pre_second": keys.second, "q_pre_second": keys.metric, "inv_freq": inv_freq}
        self.add(layer, {name: x for name, x in parts.items() if x is not None})

    def add(self, layer: int, tensors: dict[str, Tensor]) -> None:
        """Keep tensors of a layer besides its statistics, those of heads as [H, ...]."""
        self.tensors |= {f"{layer}.{name}": x.detach().to(torch.float32, copy=True).cpu().contiguous() for name, x in tensors.items()}

    def save(self, path: str | Path) -> None:
        from safetensors.torch import save_file

        save_file(self.tensors, path, metadata=self.about)

    def heads(self, name: str, spec: LayerSpec) -> Tensor:
        """Tensor `name` of the layer, the rows of the kv heads that `spec` stores."""
        return self.tensors[f"{spec.layer_idx}.{name}"][spec.first_head : spec.first_head + spec.num_kv_heads]

    def keys(self, spec: LayerSpec) -> Moments:
        return self._moments(spec, "k", "q_second")

    def unrotated_keys(self, spec: LayerSpec) -> Moments:
        return self._moments(spec, "k_pre", "q_pre_second")

    def inv_freq(self, spec: LayerSpec) -> Tensor:
        return self.tensors[f"{spec.layer_idx}.inv_freq"]

    def values(self, spec: LayerSpec) -> Moments:
        return self._moments(spec, "v", "o_second")

    def _moments(self, spec: LayerSpec, side: str, metric: str) -> Moments:
        known = f"{spec.layer_idx}.{metric}" in self.tensors
        return Moments(*(self.heads(f"{side}_{name}", spec).double() for name in ("mean", "second")),
                       self.heads(metric, spec).double() if known else None)  # fmt: skip

    def check_geometry(self, spec: LayerSpec, source: str) -> None:
        """Raises: ConfigError when the file is of keys and values of another shape; source: the file, for the message."""
        key = f"{spec.layer_idx}.k_mean"
        if key not in self.tensors:
            raise ConfigError(
                f"calibration {source!r} is of a model with {self.num_layers} layers, this one has a layer {spec.layer_idx}; "
                f"calibrate this model: pikv calibrate --model DIR --text FILE --codec NAME --out FILE"
            )
        (heads, k_dim), v_dim = self.tensors[key].shape, self.tensors[f"{spec.layer_idx}.v_mean"].shape[1]
        if (k_dim, v_dim) != (spec.k_dim, spec.v_dim) or heads < spec.first_head + spec.num_kv_heads:
            raise ConfigError(
                f"calibration {source!r} holds {heads} KV heads of width {k_dim} and {v_dim} in layer {spec.layer_idx}, the model has "
                f"{spec.first_head + spec.num_kv_heads} of {spec.k_dim} and {spec.v_dim}; calibrate this model with pikv calibrate"
            )

    def check_unrotated(self, spec: LayerSpec, source: str) -> None:
        """Raises: ConfigError when the file has no keys of this layer before their rotation, or a rotation of another width."""
        if f"{spec.layer_idx}.inv_freq" not in self.tensors:
            why = self.about.get("rope", "it is of an earlier version; make it anew with pikv calibrate")
            raise ConfigError(
                f"rope = 'pre', but calibration {source!r} holds no keys of layer {spec.layer_idx} before their rotation: {why}; legal is "
                f"'post'"
            )
        width = 2 * len(self.inv_freq(spec))
        if width != spec.k_dim:
            raise ConfigError(
                f"calibration {source!r} holds a rotation of {width} channels in layer {spec.layer_idx}, the model has keys of "
                f"{spec.k_dim}; calibrate this model with pikv calibrate"
            )

    def check_model(self, spec: LayerSpec, norms: Tensor, source: str) -> None:
        """norms [H, D]: of the rows of the key projection of this layer, for the heads of `spec`. Sync: reads the device.

        Raises: ConfigError when the statistics are of other weights.
        """
        if f"{spec.layer_idx}.fingerprint" not in self.tensors:
            raise ConfigError(f"calibration {source!r} names no model; make it with pikv calibrate")
        own, known = norms.detach().double().cpu(), self.heads("fingerprint", spec).double()
        if not same_weights(own, known):
            raise ConfigError(
                f"calibration {source!r} was made with other weights ({self.about.get('model', 'a model without a name')}): the key "
                f"projection of layer {spec.layer_idx} differs; calibrate this model with pikv calibrate"
            )


def same_weights(own: Tensor, known: Tensor) -> bool:
    """Whether two fingerprints, f64 on the CPU, are of the same weights."""
    return own.shape == known.shape and torch.allclose(own, known, rtol=FINGERPRINT_TOLERANCE, atol=1e-6)


def load(path: str) -> Calibration:
    """Raises: ValueError for a file that is missing, unreadable or no calibration; the message completes "legal is ..."."""
    file = Path(path).expanduser()
    try:
        stat = file.stat()
    except OSError as error:
        raise ValueError(f"calibration = a file that `pikv calibrate` wrote, got {path!r}: {error.strerror}") from error
    return _load(file, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=8)
def _load(file: Path, changed: int, size: int) -> Calibration:
    tensors, about = read_file(file, "calibration")
    if about.get("format") != f"pikv calibration {VERSION}":
        given = json.dumps(about)[:80]
        raise ValueError(f"calibration = a file that `pikv calibrate` wrote (format {VERSION}), got {str(file)!r} with metadata {given}")
    broken = not_finite(tensors)
    if broken:
        raise ValueError(f"calibration = finite statistics, but {broken[0]!r} of {str(file)!r} has values that are not")
    return Calibration(tensors, about)

"""The file of a trained part: weights of one module, and for which model, layers and options it was trained.

Metadata: "format", "part", "options" and "layers" (JSON), "model", "text", versions, and what the fit found. Tensors: those of the module
under its own names, and "fingerprint.L" [H, D] f32, norms of the rows of layer L's key projection.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pikv_ds.errors import ConfigError
from pikv_ds.spec import LayerSpec

from .calibration import same_weights
from .weights import not_finite, read_file

VERSION = 1
FORMAT = f"pikv trained part {VERSION}"
FINGERPRINT = "fingerprint."
TRAIN = "pikv train {part} --model DIR --text FILE --out FILE"


class TrainedLayer(NamedTuple):
    """What a part knows of a layer of its model, before any tensor-parallel split."""

    num_kv_heads: int
    k_dim: int
    v_dim: int
    num_q_heads: int


@dataclass(frozen=True, kw_only=True)
class PartFile:
    """One trained part. Two ranks that read one file have the same one; nothing in it names a rank."""

    part: str
    layers: tuple[TrainedLayer, ...]
    options: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    fingerprint: Sequence[Tensor]
    """[H, D] of every layer; empty for weights that are of no model (tests)."""
    about: Mapping[str, str]
    """Further metadata: model, text, versions, what the fit found."""
    source: str = "PartFile"
    """Where it was read, for messages."""

    def save(self, path: str | Path) -> None:
        from safetensors.torch import save_file

        tensors = {name: x.detach().cpu().contiguous() for name, x in self.weights.items()}
        tensors |= {f"{FINGERPRINT}{i}": x.detach().to(torch.float32).cpu().contiguous() for i, x in enumerate(self.fingerprint)}
        layers = json.dumps([list(layer) for layer in self.layers])
        known = {"format": FORMAT, "part": self.part, "options": json.dumps(dict(self.options)), "layers": layers}
        save_file(tensors, path, metadata={**self.about, **known})

    @staticmethod
    def load(path: str | Path, part: str, option: str = "path") -> PartFile:
        """Raises: ValueError for a file that is missing, of an older form, of another part, or with values that are not finite."""
        file = Path(path).expanduser()
        tensors, about = read_file(file, option)
        wanted = f"{option} = a file that `{TRAIN.format(part=part)}` wrote"
        if about.get("format") != FORMAT:
            given = about.get("format", "no format: weights of an older form, or of something else")
            raise ValueError(f"{wanted} ({FORMAT!r}), but {str(path)!r} has {given}; train it anew")
        if about["part"] != part:
            raise ValueError(f"{wanted}, but {str(path)!r} holds the part {about['part']!r}")
        broken = not_finite(tensors)
        if broken:
            raise ValueError(f"{wanted}, with finite weights, but {broken[0]!r} of {str(path)!r} has values that are not")
        layers = tuple(TrainedLayer(*layer) for layer in json.loads(about["layers"]))
        marks = [tensors.pop(f"{FINGERPRINT}{i}") for i in range(len(layers)) if f"{FINGERPRINT}{i}" in tensors]
        more = {name: value for name, value in about.items() if name not in ("format", "part", "options", "layers")}
        return PartFile(
            part=part, layers=layers, options=json.loads(about["options"]), weights=tensors, fingerprint=marks, about=more, source=str(path)
        )

    def check_layers(self, layers: Sequence[LayerSpec], key: str) -> None:
        """Raises: ConfigError when the part was trained for other layers than `layers`; key: of the block that names the file."""
        for spec in layers:
            if spec.layer_idx >= len(self.layers):
                raise ConfigError(
                    f"{key} = {self.source!r} was trained for {len(self.layers)} layers, this model has a layer {spec.layer_idx}; train "
                    f"the part for this model: {TRAIN.format(part=self.part)}"
                )
            own = self.layers[spec.layer_idx]
            if (own.k_dim, own.v_dim) != (spec.k_dim, spec.v_dim) or own.num_kv_heads < spec.first_head + spec.num_kv_heads:
                raise ConfigError(
                    f"{key} = {self.source!r} was trained for {own.num_kv_heads} KV heads of width {own.k_dim} and {own.v_dim} in layer "
                    f"{spec.layer_idx}, this model has {spec.first_head + spec.num_kv_heads} of {spec.k_dim} and {spec.v_dim}; train the "
                    f"part for this model: {TRAIN.format(part=self.part)}"
                )

    def check_model(self, spec: LayerSpec, norms: Tensor, key: str) -> None:
        """norms [H, D]: of the rows of the key projection of this layer, for the heads of `spec`. Sync: reads the device.

        Raises: ConfigError when the part was trained on other weights.
        """
        if spec.layer_idx >= len(self.fingerprint):
            raise ConfigError(f"{key} = {self.source!r} names no model; train it with {TRAIN.format(part=self.part)}")
        known = self.fingerprint[spec.layer_idx][spec.first_head : spec.first_head + spec.num_kv_heads].double()
        own = norms.detach().double().cpu()
        if not same_weights(own, known):
            raise ConfigError(
                f"{key} = {self.source!r} was trained on other weights ({self.about.get('model', 'a model without a name')}): the key "
                f"projection of layer {spec.layer_idx} differs; train the part for this model: {TRAIN.format(part=self.part)}"
            )

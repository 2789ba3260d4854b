"""The rotation that a transformers model gives its keys, for codecs that undo it (rope "pre"); what is not known for sure is refused."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from pikv_ds.codecs.rope import default_inv_freq
from pikv_ds.errors import ConfigError, UnsupportedError
from pikv_ds.spec import LayerSpec


def inv_freq_of(config: PreTrainedConfig, spec: LayerSpec) -> Tensor:
    """[k_dim / 2] f32. Raises: UnsupportedError for any rotation but rope_type "default" over the whole width."""
    text = config.get_text_config(decoder=True)
    parameters = getattr(text, "rope_parameters", None) or {}
    kinds = getattr(text, "layer_types", None) or []
    if spec.layer_idx < len(kinds) and isinstance(parameters.get(kinds[spec.layer_idx]), dict):
        parameters = parameters[kinds[spec.layer_idx]]
    what = f"layer {spec.layer_idx} of model_type {text.model_type!r}"
    if spec.latent:
        raise UnsupportedError(f"{what} stores a latent (MLA), of which a part is rotated")
    if "rope_theta" not in parameters:
        raise UnsupportedError(f"{what} has no rope_theta among its rope_parameters")
    if parameters.get("rope_type", "default") != "default":
        raise UnsupportedError(f"{what} has rope_type {parameters['rope_type']!r}; only 'default' is undone")
    partial = parameters.get("partial_rotary_factor", getattr(text, "partial_rotary_factor", None))
    if partial not in (None, 1, 1.0):
        raise UnsupportedError(f"{what} has partial_rotary_factor {partial}; only keys that are rotated over their whole width are undone")
    return default_inv_freq(parameters["rope_theta"], spec.k_dim)


def check_rotations(model: nn.Module, layers: list[LayerSpec], undone: Sequence[Tensor | None]) -> None:
    """undone: of each layer, PiKVCache.rotations. Raises: ConfigError when a codec undoes another rotation than the model's."""
    for spec, inv_freq in zip(layers, undone, strict=True):
        if inv_freq is None:
            continue
        try:
            own = inv_freq_of(model.config, spec)
        except UnsupportedError as error:
            raise ConfigError(f"pikv.compression.rope = 'pre': {error}; legal is 'post'") from None
        if not torch.allclose(own, inv_freq.cpu(), rtol=1e-5):
            raise ConfigError(
                f"pikv.compression.rope = 'pre': the calibration undoes another rotation than layer {spec.layer_idx} has (rope_theta?); "
                f"calibrate this model with pikv calibrate"
            )

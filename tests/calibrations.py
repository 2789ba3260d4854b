"""Calibrations made of random moments: full-rank, with means, metrics and fingerprints of a model."""

import torch

from pikv_ds.codecs.calibration import Calibration, Moments
from pikv_ds.spec import LayerSpec


def random_moments(heads: int, dim: int, seed: int) -> Moments:
    """Of vectors with a mean of about the size of their spread, and of queries (outputs) that see some directions more than others."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    mean, spread, seen = draw(heads, dim), draw(heads, dim, dim), draw(heads, dim, dim)
    covariance = spread @ spread.mT / dim + 0.1 * torch.eye(dim)
    return Moments(mean, covariance + mean.unsqueeze(-1) * mean.unsqueeze(-2), seen @ seen.mT / dim + 0.1 * torch.eye(dim))


def random_calibration(
    layers: list[LayerSpec], fingerprint: list[torch.Tensor] | None = None, rotations: list[torch.Tensor] | None = None
) -> Calibration:
    """rotations: inv_freq of each layer, if it is to hold keys before their rotation as well."""
    moments = [
        (random_moments(s.num_kv_heads, s.k_dim, 2 * s.layer_idx), random_moments(s.num_kv_heads, s.v_dim, 2 * s.layer_idx + 1))
        for s in layers
    ]
    found = Calibration.of(moments, fingerprint=fingerprint, about={"model": "random"})
    for s, inv_freq in zip(layers, rotations or [], strict=False):
        found.add_unrotated(s.layer_idx, random_moments(s.num_kv_heads, s.k_dim, 1000 + s.layer_idx), inv_freq)
    return found


def measured_calibration(samples: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> Calibration:
    """Of q [N, Hq, D], k and v [N, H, D] of every layer."""
    return Calibration.of([(Moments.of(k, q), Moments.of(v)) for q, k, v in samples])

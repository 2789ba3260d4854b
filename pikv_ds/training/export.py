"""From what a fit found to the file that a method loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from pikv_ds.codecs.part_file import PartFile

from .part import LearnedPart
from .recorded import ModelFacts


def export(
    part: LearnedPart, facts: ModelFacts, weights: Mapping[str, Tensor], fingerprint: Sequence[Tensor], about: Mapping[str, str]
) -> PartFile:
    """fingerprint: [H, D] of every layer's key projection. about: model, text, versions, what the fit found."""
    return PartFile(
        part=part.name,
        layers=facts.trained_layers,
        options=part.options(),
        weights=dict(weights),
        fingerprint=list(fingerprint),
        about=about,
    )

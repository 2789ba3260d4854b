"""How a session knows its model on every host: by the norms of the rows of its key projections."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pikv_ds.codecs.calibration import FINGERPRINT_TOLERANCE
from pikv_ds.errors import SessionError

NORMS = "norms "  # and the layer: [H, D] f64, of all heads of the model


def check_norms(own: Mapping[str, Tensor], saved: Mapping[str, Tensor], model: str, path: str) -> None:
    """own: of the layers that have a key projection of their own, saved: of a file. Raises: SessionError."""
    known = {name: x for name, x in saved.items() if name.startswith(NORMS)}
    if known.keys() != own.keys():
        raise SessionError(f"{path!r} knows its model by {len(known)} key projections, {model} has {len(own)}; load the model it is of")
    for name, x in own.items():
        if known[name].shape != x.shape or not torch.allclose(known[name], x.cpu(), rtol=FINGERPRINT_TOLERANCE, atol=1e-6):
            raise SessionError(
                f"{path!r} is of another model: the key projection of layer {name.split()[1]} of {model} differs; load the model that it "
                f"was saved with"
            )

from typing import Literal

import torch

from pikv_ds.codecs import CODECS
from pikv_ds.codecs.calibration import Moments
from pikv_ds.codecs.linear import LinearCodec, top_directions
from pikv_ds.codecs.maps import Linear


@CODECS.register("crop")
class Crop(LinearCodec):
    """The first r channels after a rotation (the paper's FastV; not Chen et al.'s pruning of image tokens).

    c = (R k)_{0:r}, k_hat = R^T [c, 0]: ||k - k_hat||^2 = ||(R k)_{r:D}||^2. R is one rotation for all kv heads of a layer, the
    eigenvectors of their mean second moment ("calibrated"; with a rotation per head it would be lora), or none: raw channels are cropped.
    Source: PiKV, arXiv 2508.06526, table 2 (C_F).
    Bytes per token and layer: those of `store` at width r, as lora.
    """

    def __init__(
        self,
        *,
        rank: int,
        calibration: str,
        store: str = "none",
        group: int | None = None,
        rope: Literal["post", "pre"] = "post",
        rotation: Literal["calibrated", "none"] = "calibrated",
    ) -> None:
        super().__init__(rank=rank, calibration=calibration, store=store, group=group, rope=rope)
        self.rotation = rotation

    def fit(self, moments: Moments, rank: int) -> Linear:
        heads, dim = moments.mean.shape
        if self.rotation == "none":
            kept = torch.eye(dim, dtype=torch.float64)[:, :rank].expand(heads, -1, -1)
            return Linear(kept, kept.mT)
        encode, decode = top_directions(moments.second.mean(0, keepdim=True), rank)
        return Linear(encode.expand(heads, -1, -1), decode.expand(heads, -1, -1))

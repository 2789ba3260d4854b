from typing import Literal

from pikv_ds.codecs import CODECS
from pikv_ds.codecs.calibration import Moments
from pikv_ds.codecs.linear import LinearCodec, top_directions
from pikv_ds.codecs.maps import Linear


@CODECS.register("lora_plus")
class LoRAPlus(LinearCodec):
    """Affine low-rank projection: as lora, around the mean of the keys and of the values.

    k_hat = W_u W_d k + b, b = (I - W_u W_d) m, W from the first r eigenvectors of the covariance: E||k - k_hat||^2 = sum_{i>r} of its
    eigenvalues = E||W_u W_d k + b - k||^2, the expression of the paper's C_Lo+, at its minimum. Keys have channels of large mean, so it
    loses less than lora. m is subtracted before storing, which also makes the coefficients easier to round. `fit` as in lora.
    Source: PiKV, arXiv 2508.06526, table 2.
    Bytes per token and layer: those of `store` at width r, as lora; b is kept once per model.
    """

    def __init__(
        self,
        *,
        rank: int,
        calibration: str,
        store: str = "none",
        group: int | None = None,
        rope: Literal["post", "pre"] = "post",
        fit: Literal["norm", "attention"] = "norm",
    ) -> None:
        super().__init__(rank=rank, calibration=calibration, store=store, group=group, rope=rope)
        self.metric = fit

    def fit(self, moments: Moments, rank: int) -> Linear:
        maps = top_directions(moments.covariance, rank, moments.metric if self.metric == "attention" else None)
        return Linear(*maps, moments.mean)

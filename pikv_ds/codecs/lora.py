from typing import Literal

from pikv_ds.codecs import CODECS
from pikv_ds.codecs.calibration import Moments
from pikv_ds.codecs.linear import LinearCodec, top_directions
from pikv_ds.codecs.maps import Linear


@CODECS.register("lora")
class LoRA(LinearCodec):
    """Low-rank projection of keys and values, per layer and kv head, fitted to a calibration text.

    c = W_d k, k_hat = W_u c, W_u = W_d^T = the first r eigenvectors of E[k k^T]: E||k - k_hat||^2 = sum_{i>r} of its eigenvalues, which is
    the bound of the paper's C_Lo. `fit` "attention" loses least of what attention makes of it instead: of q . k for the queries of the
    calibration, and of W_o v.
    Source: PiKV, arXiv 2508.06526, table 2; keys in the space that queries see: Eigen Attention, arXiv 2408.05646.
    Bytes per token and layer: those of `store` at width r: with "none" num_kv_heads * 2 r * itemsize.
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
        return Linear(*top_directions(moments.second, rank, moments.metric if self.metric == "attention" else None))

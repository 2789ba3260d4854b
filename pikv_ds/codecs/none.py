import torch
from torch import Tensor

from pikv_ds.codecs import CODECS
from pikv_ds.codecs.base import Codec, Field


@CODECS.register("none")
class NoCodec(Codec):
    """Store keys and values as the model computed them (exact mode).

    decode(encode(k, v)) = (k, v). Bytes per token and layer: num_kv_heads * (k_dim + v_dim) * itemsize.
    """

    preferred_page_size = 32
    max_rel_error = 0.0

    def bytes_per_token(self, num_kv_heads: int, k_dim: int, v_dim: int, itemsize: int) -> int:
        return num_kv_heads * (k_dim + v_dim) * itemsize

    def fields(self, num_kv_heads: int, k_dim: int, v_dim: int, dtype: torch.dtype) -> dict[str, Field]:
        return {"k": Field((num_kv_heads, k_dim), dtype), "v": Field((num_kv_heads, v_dim), dtype)}

    def encode(self, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        return {"k": k, "v": v}

    def decode(self, fields: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return fields["k"], fields["v"]

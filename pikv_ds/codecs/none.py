import torch

from pikv_ds.codecs import CODECS
from pikv_ds.codecs.base import Codec

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@CODECS.register("none")
class NoCodec(Codec):
    """Store keys and values as the model computed them (exact mode).

    decode(encode(k, v)) = (k, v). Bytes per token and layer: num_kv_heads * (k_dim + v_dim) * itemsize.
    """

    lossless = True
    preferred_page_size = 32

    def format_name(self, dtype: torch.dtype) -> str:
        if dtype not in _NAMES:
            raise ValueError(f"keys of {dtype} cannot be stored as they are; legal: {', '.join(map(str, _NAMES))}")
        return _NAMES[dtype]

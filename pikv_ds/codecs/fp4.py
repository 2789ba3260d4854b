import torch

from pikv_ds.codecs import CODECS
from pikv_ds.codecs.base import Codec
from pikv_ds.ops.format.formats import FORMATS


@CODECS.register("fp4_e2m1")
class Fp4(Codec):
    """4-bit floats (e2m1) with an e4m3 scale per 16 columns of a token, and a power of two per token and head, for K and for V.

    value = code * scale * 2^n (OCP MX, arXiv 2310.10537; the block of 16 and its e4m3 scale as NVFP4). Nothing is shared between tokens, so
    there is no raw tail and pages may be of any size.
    Bytes per token and layer: num_kv_heads * (k_dim + v_dim) / 2, and num_kv_heads * (ceil(dim / 16) + 1) for k_dim and for v_dim.
    MLA: v_dim / 2 + ceil(v_dim / 16) + 1 + 2 (k_dim - v_dim), the rotary part in fp16; with rope_raw false those of k_dim alone.
    """

    preferred_page_size = FORMATS["fp4_e2m1"].preferred_page_size

    def __init__(self, *, rope_raw: bool | None = None) -> None:
        self.rope_raw = rope_raw

    def format_name(self, dtype: torch.dtype) -> str:
        return "fp4_e2m1"

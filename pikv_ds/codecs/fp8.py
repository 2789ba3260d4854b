import torch

from pikv_ds.codecs import CODECS
from pikv_ds.codecs.base import Codec
from pikv_ds.ops.format.formats import FORMATS


@CODECS.register("fp8_e4m3")
class Fp8(Codec):
    """8-bit floats (e4m3) with a power-of-two scale per token and head, for K and for V.

    value = code * 2^n, so only the code rounds: relative error at most 2^-4 per element (OCP FP8, arXiv 2209.05433).
    Bytes per token and layer: num_kv_heads * (k_dim + v_dim + 4).
    MLA: v_dim + 2 + 2 (k_dim - v_dim), the rotary part in fp16; with rope_raw false k_dim + 2.
    """

    preferred_page_size = FORMATS["fp8_e4m3"].preferred_page_size

    def __init__(self, *, rope_raw: bool | None = None) -> None:
        self.rope_raw = rope_raw

    def format_name(self, dtype: torch.dtype) -> str:
        return "fp8_e4m3"

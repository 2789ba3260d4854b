import torch

from pikv_ds.codecs import CODECS
from pikv_ds.codecs.grouped import GroupedIntegers


@CODECS.register("coarse_int8")
class CoarseInt8(GroupedIntegers):
    """8-bit integers whose K scales serve 128 tokens: fewer bytes of scales than int8, more error of keys.

    As int8: value = code * scale + zero, code 0..255 (KIVI, arXiv 2402.02750).
    Bytes per token and layer: num_kv_heads * (k_dim + v_dim + 4 k_dim / group + 4), and a tail of group keys per request and shard.
    """

    def __init__(self, *, group: int = 128, rope_raw: bool | None = None) -> None:
        super().__init__(group=group, rope_raw=rope_raw)

    @property
    def preferred_page_size(self) -> int:
        return self.group

    def format_name(self, dtype: torch.dtype) -> str:
        return "int8"

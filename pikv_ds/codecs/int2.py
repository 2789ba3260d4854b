from pikv_ds.codecs import CODECS
from pikv_ds.codecs.grouped import GroupedIntegers


@CODECS.register("int2")
class Int2(GroupedIntegers):
    """2-bit integers: K per channel over groups of tokens, V per token.

    As int4, with codes 0..3, four to a byte (KIVI, arXiv 2402.02750). On the bundled model's K and V the error is 0.27 and 0.39 of their
    norm, against 0.05 and 0.08 of int4 (group 32). A scale per 16 columns of V would bring 0.33 for 4 bytes more per token and head of 32.
    Bytes per token and layer: num_kv_heads * ((k_dim + v_dim) / 4 + 4 k_dim / group + 4), and a tail of group keys per request and shard.
    MLA: v_dim / 4 + 4 v_dim / group + 2 (k_dim - v_dim), the rotary part in fp16; with rope_raw false k_dim / 4 + 4 k_dim / group.
    """

    def __init__(self, *, group: int = 32, rope_raw: bool | None = None) -> None:
        super().__init__(group=group, rope_raw=rope_raw)

from pikv_ds.codecs import CODECS
from pikv_ds.codecs.grouped import GroupedIntegers


@CODECS.register("int4")
class Int4(GroupedIntegers):
    """4-bit integers: K per channel over groups of tokens, V per token.

    As int8, with codes 0..15, two to a byte (KIVI, arXiv 2402.02750).
    Bytes per token and layer: num_kv_heads * ((k_dim + v_dim) / 2 + 4 k_dim / group + 4), and a tail of group keys per request and shard.
    MLA: v_dim / 2 + 4 v_dim / group + 2 (k_dim - v_dim), the rotary part in fp16; with rope_raw false k_dim / 2 + 4 k_dim / group.
    """

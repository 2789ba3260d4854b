from pikv_ds.codecs import CODECS
from pikv_ds.codecs.grouped import GroupedIntegers


@CODECS.register("int8")
class Int8(GroupedIntegers):
    """8-bit integers: K per channel over groups of tokens, V per token.

    value = code * scale + zero, code 0..255, scale and zero fp16. Keys have channels of large mean, so K shares its scales along tokens
    (KIVI, arXiv 2402.02750); V shares them along its row. The newest group of K of a request and shard stays raw until it is full.
    Bytes per token and layer: num_kv_heads * (k_dim + v_dim + 4 k_dim / group + 4), and a tail of group keys per request and shard.
    MLA: v_dim + 4 v_dim / group + 2 (k_dim - v_dim), the rotary part in fp16; with rope_raw false k_dim + 4 k_dim / group.
    """

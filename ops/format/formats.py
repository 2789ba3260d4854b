"""The page record: how the keys, values, scales and positions of one page lie in memory. Pure Python, shared by every implementation.

A layer's pages are one uint8 tensor [num_pages, record_bytes], each record starting on a 64-byte boundary. Inside a record:

    for each kv head:   K codes [page_size, k_coded]   V codes [page_size, v_dim]   scales and zeros of this head
    after all heads:    positions [page_size] int32

Every block starts on a 16-byte boundary. K and V may have different formats.
The blocks of a head, in this order (absent ones take no bytes):

    k        codes, one row per token                    all formats
    v        codes, one row per token                    unless latent: then the values are the first v_dim columns of k
    k_scale  fp16 [page_size / group, k_coded] integers; fp16 [page_size] fp8; e4m3 [page_size, ceil(k_coded / 16)] fp4
    k_zero   fp16 [page_size / group, k_coded] integers; uint8 [page_size] fp4
    v_scale  fp16 [page_size] integers, fp8; e4m3 [page_size, ceil(v_dim / 16)] fp4; unless latent
    v_zero   fp16 [page_size] integers; uint8 [page_size] fp4; unless latent
    rope     fp16 [page_size, k_dim - v_dim]             rope_raw only: the last columns of a latent key; then k_coded is v_dim, else k_dim

Meaning of a code:
    int8, int4, int2: value = code * scale + zero, code unsigned (0..255, 0..15, 0..3), zero = the value of code 0 (not an integer code).
        K shares scale and zero per channel over `group` consecutive slots, V per token over its row.
        int4 packs two neighbours into a byte, int2 four: the first column in the lowest bits.
    fp8: value = code * scale, scale a power of two, so that only the code rounds.
    fp4: value = e2m1 code * (block scale * 2^(exponent - 127)), two neighbours to a byte, the first in the low nibble. 16 columns of
        a token share an e4m3 block scale, as NVFP4 has it. e4m3 spans 2^-9 to 448 only, which keys and values exceed on both sides, so a
        row has an exponent of its own (k_zero, v_zero), the smallest that keeps its block scales within 448. NVFP4's second scale is one
        fp32 per tensor, which a cache that grows token by token does not know; a power of two in one byte rounds nothing.

Scales are fp16, not bf16: never worse, and better where a channel's mean is large against its spread, as keys have it (measured in
tests/ops/test_formats.py: at a mean of 100 spreads bf16 has 2.5 x the error, at 20 spreads 1.1 x). fp32's range is not needed: values
beyond +-65504 saturate. fp8 scales K per token, not per page: e4m3 keeps a relative precision of 2^-4 whatever the scale is, so a finer
scale costs 2 bytes per token and removes the need to re-encode a page whose maximum grows.

The group that is not full yet is kept raw (K only) in a tail [rows, num_kv_heads, group, k_dim] outside the record; see `append`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from .checks import check

GROUP = 64
FP4_BLOCK = 16  # columns that share an e4m3 scale
BLOCK_ALIGN = 16
RECORD_ALIGN = 64


class Traits(NamedTuple):
    code: int  # what the kernels switch on, below 15; never renumber
    bits: int  # per stored element
    preferred_page_size: int
    levels: int  # largest code of an integer format, else 0
    rounding: float  # relative rounding of one element of a floating format, else 0


FORMATS = {
    "fp32": Traits(0, 32, 32, 0, 0.0),
    "bf16": Traits(1, 16, 32, 0, 2.0**-8),
    "fp16": Traits(2, 16, 32, 0, 2.0**-11),
    "int8": Traits(3, 8, 64, 255, 0.0),
    "int4": Traits(4, 4, 64, 15, 0.0),
    "fp8_e4m3": Traits(5, 8, 32, 0, 2.0**-4),
    "int2": Traits(6, 2, 64, 3, 0.0),
    # Of a block whose largest element is a: none from 0.5 up is off by more than a fifth of itself, and what those below are off by is less
    # than a's own error leaves of a fifth. 2^-9: blocks far below the row's largest, whose scales are e4m3 subnormals.
    "fp4_e2m1": Traits(7, 4, 32, 0, 0.2 + 2.0**-9),
}


class HeadOffsets(NamedTuple):
    """Byte offsets of the blocks inside the section of one head; -1 where the format has no such block. `end` = bytes of the section."""

    k: int
    v: int
    k_scale: int
    k_zero: int
    v_scale: int
    v_zero: int
    rope: int
    end: int


NAMES = [name for name, _ in sorted(FORMATS.items(), key=lambda item: item[1].code)]  # by code


@dataclass(frozen=True)
class PageFormat:
    """Record layout of one layer.

    Args:
        name: one of FORMATS. num_kv_heads: heads stored here (MLA: 1).
        k_dim: width of a key, a multiple of 8 up to 576. v_dim: width of a value; latent: the columns of the key that are the value.
        page_size: tokens per page, 1 to 256; for an integer K a multiple of `group`.
        latent: values are the first v_dim columns of the keys and are not stored again.
        group: tokens that share a K scale (int8, int4, int2), at least 32.
        v_name: format of the values, None = name. rope_raw: the last k_dim - v_dim columns of a latent key are fp16, the rest in `name`.
        fast: the ops may round queries and weights that meet integers to one byte (docs/reference/formats.md); the record is the same.
    """

    name: str
    num_kv_heads: int
    k_dim: int
    v_dim: int
    page_size: int
    latent: bool = False
    group: int = GROUP
    v_name: str | None = None
    rope_raw: bool = False
    fast: bool = False
    # The format as the ops take it (ops/library.py). Made once: it is read per layer and step, and torch.compile traces no cached_property.
    layout: tuple[int, int, int, int, int, int, bool] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in (self.name, self.v_name or self.name):
            if name not in FORMATS:
                raise ValueError(f"page format {name!r} is not known; one of: {', '.join(FORMATS)}")
        object.__setattr__(self, "v_name", self.v_name or self.name)
        check(self)
        code = self.code | (self.v_traits.code + 1 << 4 if self.mixed else 0) | self.rope_raw << 8 | self.fast << 9
        layout = (code, self.num_kv_heads, self.k_dim, self.v_dim, self.page_size, self.group, self.latent)
        object.__setattr__(self, "layout", layout)

    @classmethod
    def from_layout(cls, layout: tuple[int, int, int, int, int, int, bool]) -> PageFormat:
        code, heads, k_dim, v_dim, page_size, group, latent = layout
        v_name = NAMES[(code >> 4 & 15) - 1] if code >> 4 & 15 else None
        return cls(NAMES[code & 15], heads, k_dim, v_dim, page_size, latent, group, v_name, bool(code >> 8 & 1), bool(code >> 9))

    @property
    def traits(self) -> Traits:
        return FORMATS[self.name]

    @property
    def v_traits(self) -> Traits:
        return FORMATS[self.v_name]

    @property
    def mixed(self) -> bool:
        """K and V have different formats."""
        return self.v_name != self.name

    @property
    def label(self) -> str:
        """For messages and tables: int4, int8/int4 (K/V), int4+rope."""
        return f"{self.name}/{self.v_name}" if self.mixed else self.name + "+rope" * self.rope_raw

    @property
    def code(self) -> int:
        """Of the keys."""
        return self.traits.code

    @property
    def k_coded(self) -> int:
        """Columns of a key that are in the format; with rope_raw the others are fp16."""
        return self.v_dim if self.rope_raw else self.k_dim

    @property
    def grouped(self) -> bool:
        """K is encoded a group of tokens at a time, so a raw tail is needed."""
        return self.traits.levels > 0

    @property
    def raw(self) -> bool:
        """Records hold plain torch elements: `views` works and attention may read them in place."""
        return self.traits.bits >= 16 and self.v_traits.bits >= 16

    @property
    def preferred_page_size(self) -> int:
        return self.traits.preferred_page_size

    @property
    def k_row_bytes(self) -> int:
        return self.k_coded * self.traits.bits // 8

    @property
    def v_row_bytes(self) -> int:
        return 0 if self.latent else self.v_dim * self.v_traits.bits // 8

    @cached_property
    def head(self) -> HeadOffsets:
        """Where the blocks of head h start: h * head.end + head.<block>."""
        N = self.page_size
        k_scale = (2 * (N // self.group) * self.k_coded,) * 2 if self.grouped else _row_scales(self.name, self.k_coded, N)
        v_scale = (0, 0) if self.latent else _row_scales(self.v_name, self.v_dim, N)
        rope = 2 * N * (self.k_dim - self.v_dim) if self.rope_raw else 0
        starts, at = [], 0
        for size in (N * self.k_row_bytes, N * self.v_row_bytes, *k_scale, *v_scale, rope):
            starts.append(at if size else -1)
            at = _align(at + size, BLOCK_ALIGN)
        return HeadOffsets(*starts, at)

    @cached_property
    def positions_offset(self) -> int:
        return self.num_kv_heads * self.head.end

    @cached_property
    def record_bytes(self) -> int:
        return _align(self.positions_offset + 4 * self.page_size, RECORD_ALIGN)

    @property
    def bytes_per_token(self) -> float:
        """Allocated bytes of one slot without its int32 position: codes, its share of scales and of padding."""
        return self.record_bytes / self.page_size - 4

    @property
    def tail_elements(self) -> int:
        """Raw key elements, of 2 bytes each, of the tail of one (request, shard); 0 for the formats without groups."""
        return self.num_kv_heads * self.group * self.k_dim if self.grouped else 0

    @property
    def k_rel_error(self) -> float:
        """Largest ||k - decode(encode(k))|| / ||k|| of any keys in fp16's range (worst case, not the usual one)."""
        return _rel_error(self.traits, self.group)

    @property
    def v_rel_error(self) -> float:
        """The same for values. A latent layer's values are columns of its keys."""
        return _rel_error(self.traits, self.group) if self.latent else _rel_error(self.v_traits, self.v_dim)


def _row_scales(name: str, dim: int, rows: int) -> tuple[int, int]:
    """Bytes of the scale and zero blocks of rows that are encoded each by itself."""
    if FORMATS[name].bits >= 16:
        return 0, 0
    if name == "fp4_e2m1":
        return rows * fp4_blocks(dim), rows
    return 2 * rows, 2 * rows if FORMATS[name].levels else 0


def fp4_blocks(dim: int) -> int:
    """Scales of a row; the last block may have 8 columns."""
    return -(-dim // FP4_BLOCK)


def _rel_error(traits: Traits, sharing: int) -> float:
    """`sharing` elements have one scale. A set with extremes a and b has norm >= (b - a) / sqrt(2); each element is off by at most half a
    step, and by levels * 2^-11 steps where the scale was rounded; 2^-11 of itself where the zero was, and where a raw tail was."""
    if not traits.levels:
        return traits.rounding
    return (0.5 + (traits.levels + 1) * 2.0**-11) * (2 * sharing) ** 0.5 / traits.levels + 2.0**-10


def _align(size: int, to: int) -> int:
    return -(-size // to) * to

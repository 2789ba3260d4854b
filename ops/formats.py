"""The page record: how the keys, values, scales and positions of one page lie in memory. Pure Python, shared by every implementation.

A layer's pages are one uint8 tensor [num_pages, record_bytes], each record starting on a 64-byte boundary. Inside a record:

    for each kv head:   K codes [page_size, k_dim]   V codes [page_size, v_dim]   scales and zeros of this head
    after all heads:    positions [page_size] int32

Every block starts on a 16-byte boundary. The blocks of a head, in this order (absent ones take no bytes):

    k        codes, one row per token                    all formats
    v        codes, one row per token                    unless latent: then the values are the first v_dim columns of k
    k_scale  fp16 [page_size / group, k_dim] int8, int4; [page_size] fp8
    k_zero   fp16 [page_size / group, k_dim] int8, int4
    v_scale  fp16 [page_size]                int8, int4, fp8, unless latent
    v_zero   fp16 [page_size]                int8, int4, unless latent

Meaning of a code:
    int8, int4: value = code * scale + zero, code unsigned (0..255, 0..15), zero = the value of code 0 (not an integer code).
        K shares scale and zero per channel over `group` consecutive slots, V per token over its row.
        int4 packs two neighbours into a byte: the even column in the low nibble.
    fp8: value = code * scale, scale a power of two, so that only the code rounds.

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

MAX_PAGE_SIZE = 256
MAX_HEAD_DIM = 576
MIN_GROUP = 64  # K scales cost 4 * k_dim bytes per group: below 64 tokens they outweigh what int4 saves
BLOCK_ALIGN = 16
RECORD_ALIGN = 64


class Traits(NamedTuple):
    code: int  # what the kernels switch on; never renumber
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
}


class HeadOffsets(NamedTuple):
    """Byte offsets of the blocks inside the section of one head; -1 where the format has no such block. `end` = bytes of the section."""

    k: int
    v: int
    k_scale: int
    k_zero: int
    v_scale: int
    v_zero: int
    end: int


@dataclass(frozen=True)
class PageFormat:
    """Record layout of one layer.

    Args:
        name: one of FORMATS. num_kv_heads: heads stored here (MLA: 1).
        k_dim: width of a key, a multiple of 8 up to 576. v_dim: width of a value; latent: the columns of the key that are the value.
        page_size: tokens per page, 1 to 256; for int8 and int4 a multiple of `group`.
        latent: values are the first v_dim columns of the keys and are not stored again.
        group: tokens that share a K scale (int8, int4), at least 64.
    """

    name: str
    num_kv_heads: int
    k_dim: int
    v_dim: int
    page_size: int
    latent: bool = False
    group: int = MIN_GROUP
    # The format as the ops take it (library.py). Made once: it is read per layer and step, and torch.compile traces no cached_property.
    layout: tuple[int, int, int, int, int, int, bool] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.name not in FORMATS:
            raise ValueError(f"page format {self.name!r} is not known; one of: {', '.join(FORMATS)}")
        if self.num_kv_heads < 1:
            raise ValueError(f"page format {self.name!r}: num_kv_heads must be at least 1, got {self.num_kv_heads}")
        if not 1 <= self.page_size <= MAX_PAGE_SIZE:
            raise ValueError(f"page format {self.name!r}: page_size must be 1 to {MAX_PAGE_SIZE}, got {self.page_size}")
        for what, dim in (("k_dim", self.k_dim), ("v_dim", self.v_dim)):
            if self.name == "int4" and dim % 2:
                raise ValueError(f"page format 'int4' packs two columns into a byte: {what} must be even, got {dim}; use 'int8'")
            if dim % 8 or not 8 <= dim <= MAX_HEAD_DIM:
                raise ValueError(f"page format {self.name!r}: {what} must be a multiple of 8 from 8 to {MAX_HEAD_DIM}, got {dim}")
        if self.latent and (self.v_dim > self.k_dim or self.num_kv_heads != 1):
            raise ValueError(
                f"page format {self.name!r}: a latent layer has one head whose value is a part of its key, "
                f"got {self.num_kv_heads} heads, v_dim {self.v_dim}, k_dim {self.k_dim}"
            )
        if self.grouped and self.group < MIN_GROUP:
            raise ValueError(f"page format {self.name!r}: K scale group must be at least {MIN_GROUP} tokens, got {self.group}")
        if self.grouped and self.page_size % self.group:
            raise ValueError(
                f"page format {self.name!r} shares K scales over groups of {self.group} tokens, and page_size {self.page_size} "
                f"is not a multiple of {self.group}; use page_size {self.group * max(1, self.page_size // self.group)}"
            )
        layout = (self.code, self.num_kv_heads, self.k_dim, self.v_dim, self.page_size, self.group, self.latent)
        object.__setattr__(self, "layout", layout)

    @property
    def traits(self) -> Traits:
        return FORMATS[self.name]

    @property
    def code(self) -> int:
        return self.traits.code

    @property
    def grouped(self) -> bool:
        """K is encoded a group of tokens at a time, so a raw tail is needed."""
        return self.traits.levels > 0

    @property
    def raw(self) -> bool:
        """Records hold plain torch elements: `views` works and attention may read them in place."""
        return self.name in ("fp32", "bf16", "fp16")

    @property
    def preferred_page_size(self) -> int:
        return self.traits.preferred_page_size

    @property
    def k_row_bytes(self) -> int:
        return self.k_dim * self.traits.bits // 8

    @property
    def v_row_bytes(self) -> int:
        return 0 if self.latent else self.v_dim * self.traits.bits // 8

    @cached_property
    def head(self) -> HeadOffsets:
        """Where the blocks of head h start: h * head.end + head.<block>."""
        k_scales = self.page_size // self.group * self.k_dim if self.grouped else self.page_size if self.name == "fp8_e4m3" else 0
        v_scales = 0 if self.raw or self.latent else self.page_size
        sizes = (
            self.page_size * self.k_row_bytes,
            self.page_size * self.v_row_bytes,
            2 * k_scales,
            2 * k_scales if self.grouped else 0,
            2 * v_scales,
            2 * v_scales if self.grouped else 0,
        )
        starts, at = [], 0
        for size in sizes:
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
        """Raw key elements of the tail of one (request, shard); 0 for the formats without groups."""
        return self.num_kv_heads * self.group * self.k_dim if self.grouped else 0

    @property
    def k_rel_error(self) -> float:
        """Largest ||k - decode(encode(k))|| / ||k|| of any keys in fp16's range (worst case, not the usual one)."""
        return self._rel_error(self.group)

    @property
    def v_rel_error(self) -> float:
        """The same for values. A latent layer's values are columns of its keys."""
        return self._rel_error(self.group if self.latent else self.v_dim)

    def _rel_error(self, sharing: int) -> float:
        """`sharing` elements have one scale. A set with extremes a and b has norm >= (b - a) / sqrt(2); each element is off by at most
        0.625 steps (half a step of the code, an eighth from rounding the scale), and by 2^-11 where the zero was rounded."""
        if not self.grouped:
            return self.traits.rounding
        return 1.25 * (sharing / 2) ** 0.5 / self.traits.levels + 2.0**-11


def _align(size: int, to: int) -> int:
    return -(-size // to) * to

"""Encode and decode page records in plain torch: the reference of every compiled version, bit by bit.

P pages, H kv heads, N tokens of a page, G tokens of a group, D a width. Layout and meaning of the codes: format/formats.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds.ops.format.formats import FORMATS, PageFormat, fp4_blocks
from pikv_ds.ops.memory import aligned_bytes

from .codes import decode_fp4, encode_fp4, encode_fp8, encode_integers, pack_bits, saturated_half, unpack_bits

_ELEMENT = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8_e4m3": torch.float8_e4m3fn}


def new_pages(fmt: PageFormat, num_pages: int, device: torch.device | str | None = None) -> Tensor:
    """Zeroed records [num_pages, record_bytes] uint8 with every position -1, on a 64-byte boundary."""
    pages = aligned_bytes(num_pages * fmt.record_bytes, device).zero_().view(num_pages, fmt.record_bytes)
    positions(pages, fmt).fill_(-1)
    return pages


def check_pages(pages: Tensor, fmt: PageFormat) -> None:
    if pages.dtype != torch.uint8 or pages.dim() != 2 or pages.shape[1] != fmt.record_bytes:
        raise ValueError(
            f"pages must be uint8 [num_pages, {fmt.record_bytes}] for {fmt.label} pages of {fmt.page_size}, "
            f"got {pages.dtype} {tuple(pages.shape)}"
        )
    if not pages.is_contiguous():
        raise ValueError(f"pages must be contiguous, got strides {pages.stride()}")


def positions(pages: Tensor, fmt: PageFormat) -> Tensor:
    """View of the stored positions, [P, N] int32."""
    return _block(pages, fmt.positions_offset, torch.int32, (fmt.page_size,))


def codes(pages: Tensor, fmt: PageFormat, part: str) -> Tensor:
    """View of the codes of "k" or "v": [P, H, N, D], formats below 8 bits packed [P, H, N, D * bits / 8] uint8."""
    name, dim = _part(fmt, part)
    return _head_block(pages, fmt, part, _ELEMENT.get(name, torch.uint8), (fmt.page_size, dim * min(FORMATS[name].bits, 8) // 8))


def scales(pages: Tensor, fmt: PageFormat, block: str) -> Tensor:
    """View of "k_scale", "k_zero", "v_scale" or "v_zero": fp16 [P, H, N / G, k_coded] for an integer K, [P, H, N] otherwise.

    fp4: e4m3 bytes [P, H, N, ceil(D / 16)] and biased exponents [P, H, N], uint8.
    """
    name, dim = _part(fmt, block[0])
    if name == "fp4_e2m1":
        return _head_block(
            pages, fmt, block, torch.uint8, (fmt.page_size, fp4_blocks(dim)) if block.endswith("scale") else (fmt.page_size,)
        )
    per_channel = block[0] == "k" and fmt.grouped
    return _head_block(pages, fmt, block, torch.float16, (fmt.page_size // fmt.group, dim) if per_channel else (fmt.page_size,))


def rope(pages: Tensor, fmt: PageFormat) -> Tensor:
    """View of the columns that rope_raw keeps: [P, H, N, k_dim - v_dim] fp16."""
    return _head_block(pages, fmt, "rope", torch.float16, (fmt.page_size, fmt.k_dim - fmt.v_dim))


def _part(fmt: PageFormat, part: str) -> tuple[str, int]:
    """Format and encoded width of "k" or "v"."""
    return (fmt.name, fmt.k_coded) if part == "k" else (fmt.v_name, fmt.v_dim)


def views(pages: Tensor, fmt: PageFormat) -> tuple[Tensor, Tensor, Tensor]:
    """Raw formats in place: k [P, H, N, Dk], v [P, H, N, Dv], positions [P, N], all views that write through.

    Latent: v is the first v_dim columns of k, at the same address.
    """
    if not fmt.raw:
        raise ValueError(f"views need a raw format (fp32, bf16, fp16), got {fmt.label!r}; use decode_pages")
    check_pages(pages, fmt)
    k = codes(pages, fmt, "k")
    return k, k[..., : fmt.v_dim] if fmt.latent else codes(pages, fmt, "v"), positions(pages, fmt)


def decode_pages(pages: Tensor, fmt: PageFormat) -> tuple[Tensor, Tensor]:
    """k [P, H, N, Dk] f32 and v [P, H, N, Dv] f32 of whole records. Slots never written decode to anything."""
    check_pages(pages, fmt)
    k = _decode(pages, fmt, "k")
    if fmt.latent:
        return torch.cat((k, rope(pages, fmt).float()), -1) if fmt.rope_raw else k, k[..., : fmt.v_dim]
    return k, _decode(pages, fmt, "v")


def encode_pages(pages: Tensor, fmt: PageFormat, page_ids: Tensor, k: Tensor, v: Tensor) -> None:
    """Write whole pages: k [n, H, N, Dk], v [n, H, N, Dv] (latent: not used) into records page_ids [n]. Positions are left alone."""
    check_pages(pages, fmt)
    if not fmt.latent:
        store_rows(pages, fmt, "v", (page_ids,), v)
    if fmt.rope_raw:
        rope(pages, fmt)[page_ids] = saturated_half(k[..., fmt.k_coded :])
    k = k[..., : fmt.k_coded]
    if not fmt.grouped:
        return store_rows(pages, fmt, "k", (page_ids,), k)
    code, scale, zero = encode_integers(k.unflatten(2, (-1, fmt.group)), fmt.traits.levels, dim=-2)  # [n, H, N / G, G, Dk]
    store_codes(pages, fmt, "k", (page_ids,), code.flatten(2, 3))
    scales(pages, fmt, "k_scale")[page_ids] = scale.squeeze(-2)
    scales(pages, fmt, "k_zero")[page_ids] = zero.squeeze(-2)


def store_rows(pages: Tensor, fmt: PageFormat, part: str, index: tuple, x: Tensor) -> None:
    """Encode rows that need no other token: everything but an integer K. `index` selects [P, H, N] like x.shape[:-1]."""
    name = _part(fmt, part)[0]
    if FORMATS[name].bits >= 16:
        codes(pages, fmt, part)[index] = x.to(_ELEMENT[name])
    elif name == "fp8_e4m3":
        code, scale = encode_fp8(x)
        codes(pages, fmt, part).view(torch.uint8)[index] = code.view(torch.uint8)
        scales(pages, fmt, f"{part}_scale")[index] = scale.squeeze(-1)
    else:
        is_fp4 = name == "fp4_e2m1"
        code, scale, zero = encode_fp4(x) if is_fp4 else encode_integers(x, FORMATS[name].levels, dim=-1)
        store_codes(pages, fmt, part, index, code)
        scales(pages, fmt, f"{part}_scale")[index] = scale if is_fp4 else scale.squeeze(-1)
        scales(pages, fmt, f"{part}_zero")[index] = zero.squeeze(-1)


def store_codes(pages: Tensor, fmt: PageFormat, part: str, index: tuple, code: Tensor) -> None:
    """Codes of an integer format or of fp4, one to a byte, packed into the block of "k" or "v"."""
    codes(pages, fmt, part)[index] = pack_bits(code, FORMATS[_part(fmt, part)[0]].bits)


def _decode(pages: Tensor, fmt: PageFormat, part: str) -> Tensor:
    name, stored = _part(fmt, part)[0], codes(pages, fmt, part)
    if FORMATS[name].bits >= 16:
        return stored.float()
    scale = scales(pages, fmt, f"{part}_scale")
    if name == "fp8_e4m3":
        return stored.float() * scale.float().unsqueeze(-1)
    zero, stored = scales(pages, fmt, f"{part}_zero"), unpack_bits(stored, FORMATS[name].bits)
    if name == "fp4_e2m1":
        return decode_fp4(stored, scale, zero)
    scale, zero = scale.float(), zero.float()
    if part == "k":
        grouped = stored.unflatten(2, (-1, fmt.group)).float()
        return (grouped * scale.unsqueeze(3) + zero.unsqueeze(3)).flatten(2, 3)
    return stored.float() * scale.unsqueeze(-1) + zero.unsqueeze(-1)


def _head_block(pages: Tensor, fmt: PageFormat, block: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    offset = getattr(fmt.head, block)
    if offset < 0:
        raise ValueError(f"{fmt.label} pages{' of a latent layer' if fmt.latent else ''} have no block {block!r}")
    return _block(pages, offset, dtype, (fmt.num_kv_heads, *shape), fmt.head.end)


def _block(pages: Tensor, offset: int, dtype: torch.dtype, shape: tuple[int, ...], head_bytes: int | None = None) -> Tensor:
    typed = pages.view(dtype)
    size = typed.element_size()
    inner = [1]
    for extent in reversed(shape[1:] if head_bytes is None else shape[2:]):
        inner.insert(0, inner[0] * extent)
    strides = (typed.stride(0), *([] if head_bytes is None else [head_bytes // size]), *inner)
    return typed.as_strided((pages.shape[0], *shape), strides, typed.storage_offset() + offset // size)

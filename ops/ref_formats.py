"""Encode and decode page records in plain torch: the reference of every compiled version, bit by bit.

P pages, H kv heads, N tokens of a page, G tokens of a group, D a width. Layout and meaning of the codes: formats.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .formats import PageFormat
from .memory import aligned_bytes

_ELEMENT = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8_e4m3": torch.float8_e4m3fn}
_F16_MAX = 65504.0
_F8_MAX = 448.0


def new_pages(fmt: PageFormat, num_pages: int, device: torch.device | str | None = None) -> Tensor:
    """Zeroed records [num_pages, record_bytes] uint8 with every position -1, on a 64-byte boundary."""
    pages = aligned_bytes(num_pages * fmt.record_bytes, device).zero_().view(num_pages, fmt.record_bytes)
    positions(pages, fmt).fill_(-1)
    return pages


def check_pages(pages: Tensor, fmt: PageFormat) -> None:
    if pages.dtype != torch.uint8 or pages.dim() != 2 or pages.shape[1] != fmt.record_bytes:
        raise ValueError(
            f"pages must be uint8 [num_pages, {fmt.record_bytes}] for {fmt.name} pages of {fmt.page_size}, "
            f"got {pages.dtype} {tuple(pages.shape)}"
        )
    if not pages.is_contiguous():
        raise ValueError(f"pages must be contiguous, got strides {pages.stride()}")


def positions(pages: Tensor, fmt: PageFormat) -> Tensor:
    """View of the stored positions, [P, N] int32."""
    return _block(pages, fmt.positions_offset, torch.int32, (fmt.page_size,))


def codes(pages: Tensor, fmt: PageFormat, part: str) -> Tensor:
    """View of the codes of "k" or "v": [P, H, N, D], int4 packed [P, H, N, D / 2] uint8."""
    dim = fmt.k_dim if part == "k" else fmt.v_dim
    width = dim // 2 if fmt.name == "int4" else dim
    return _head_block(pages, fmt, part, _ELEMENT.get(fmt.name, torch.uint8), (fmt.page_size, width))


def scales(pages: Tensor, fmt: PageFormat, block: str) -> Tensor:
    """View of "k_scale" or "k_zero" ([P, H, N / G, k_dim]; fp8: [P, H, N]), "v_scale" or "v_zero" ([P, H, N]), fp16."""
    per_channel = block[0] == "k" and fmt.grouped
    shape = (fmt.page_size // fmt.group, fmt.k_dim) if per_channel else (fmt.page_size,)
    return _head_block(pages, fmt, block, torch.float16, shape)


def views(pages: Tensor, fmt: PageFormat) -> tuple[Tensor, Tensor, Tensor]:
    """Raw formats in place: k [P, H, N, Dk], v [P, H, N, Dv], positions [P, N], all views that write through.

    Latent: v is the first v_dim columns of k, at the same address.
    """
    if not fmt.raw:
        raise ValueError(f"views need a raw format (fp32, bf16, fp16), got {fmt.name!r}; use decode_pages")
    check_pages(pages, fmt)
    k = codes(pages, fmt, "k")
    return k, k[..., : fmt.v_dim] if fmt.latent else codes(pages, fmt, "v"), positions(pages, fmt)


def decode_pages(pages: Tensor, fmt: PageFormat) -> tuple[Tensor, Tensor]:
    """k [P, H, N, Dk] f32 and v [P, H, N, Dv] f32 of whole records. Slots never written decode to anything."""
    check_pages(pages, fmt)
    k = _decode(pages, fmt, "k")
    return k, k[..., : fmt.v_dim] if fmt.latent else _decode(pages, fmt, "v")


def encode_pages(pages: Tensor, fmt: PageFormat, page_ids: Tensor, k: Tensor, v: Tensor) -> None:
    """Write whole pages: k [n, H, N, Dk], v [n, H, N, Dv] (latent: not used) into records page_ids [n]. Positions are left alone."""
    check_pages(pages, fmt)
    for part, x in (("k", k), ("v", v)):
        if part == "v" and fmt.latent:
            continue
        if fmt.grouped and part == "k":
            x = x.unflatten(2, (-1, fmt.group))  # [n, H, N / G, G, Dk]
            code, scale, zero = encode_integers(x, fmt.traits.levels, dim=-2)
            store_codes(codes(pages, fmt, part), (page_ids,), code.flatten(2, 3), fmt)
            scales(pages, fmt, "k_scale")[page_ids] = scale.squeeze(-2)
            scales(pages, fmt, "k_zero")[page_ids] = zero.squeeze(-2)
        else:
            store_rows(pages, fmt, part, (page_ids,), x)


def store_rows(pages: Tensor, fmt: PageFormat, part: str, index: tuple, x: Tensor) -> None:
    """Encode rows that need no other token: everything but the K of int8 and int4. `index` selects [P, H, N] like x.shape[:-1]."""
    if fmt.raw:
        codes(pages, fmt, part)[index] = x.to(_ELEMENT[fmt.name])
    elif fmt.grouped:
        code, scale, zero = encode_integers(x, fmt.traits.levels, dim=-1)
        store_codes(codes(pages, fmt, part), index, code, fmt)
        scales(pages, fmt, f"{part}_scale")[index] = scale.squeeze(-1)
        scales(pages, fmt, f"{part}_zero")[index] = zero.squeeze(-1)
    else:
        code, scale = encode_fp8(x)
        codes(pages, fmt, part).view(torch.uint8)[index] = code.view(torch.uint8)
        scales(pages, fmt, f"{part}_scale")[index] = scale.squeeze(-1)


def store_codes(blocks: Tensor, index: tuple, code: Tensor, fmt: PageFormat) -> None:
    blocks[index] = code[..., 0::2] | code[..., 1::2] << 4 if fmt.name == "int4" else code


def encode_integers(x: Tensor, levels: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 codes of x and the fp16 scale and zero that `dim` shares (kept as size 1): value = code * scale + zero.

    All arithmetic is f32 with one rounding per step, so that compiled versions can give the same bits. The codes are computed from the
    rounded scale and zero, so their rounding shifts the grid and is no error of its own.
    """
    x = x.float()
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    zero = low.clamp(-_F16_MAX, _F16_MAX).half()
    scale = ((high.clamp(-_F16_MAX, _F16_MAX) - zero.float()) * (1.0 / levels)).clamp_min(0).half()
    inverse = torch.where(scale > 0, 1.0 / scale.float(), 0.0)
    code = ((x - zero.float()) * inverse).round().clamp(0, levels).to(torch.uint8)
    return code, scale, zero


def encode_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 codes of rows and their fp16 scale, the smallest power of two that keeps the row within +-448 (2^-24 to 2^15)."""
    x = x.float()
    fraction, exponent = torch.frexp(x.abs().amax(-1, keepdim=True))  # fraction in [0.5, 1); 448 = 0.875 * 2^9
    exponent = (exponent - 9 + (fraction > 0.875)).clamp(-24, 15)
    scale = torch.ldexp(torch.ones_like(fraction), exponent)
    code = (x / scale).clamp(-_F8_MAX, _F8_MAX).to(torch.float8_e4m3fn)
    return code, scale.half()


def _decode(pages: Tensor, fmt: PageFormat, part: str) -> Tensor:
    stored = codes(pages, fmt, part)
    if fmt.raw:
        return stored.float()
    scale = scales(pages, fmt, f"{part}_scale").float()
    if fmt.name == "fp8_e4m3":
        return stored.float() * scale.unsqueeze(-1)
    zero = scales(pages, fmt, f"{part}_zero").float()
    if fmt.name == "int4":
        stored = torch.stack((stored & 15, stored >> 4), -1).flatten(-2)
    if part == "k":
        grouped = stored.unflatten(2, (-1, fmt.group)).float()
        return (grouped * scale.unsqueeze(3) + zero.unsqueeze(3)).flatten(2, 3)
    return stored.float() * scale.unsqueeze(-1) + zero.unsqueeze(-1)


def _head_block(pages: Tensor, fmt: PageFormat, block: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    offset = getattr(fmt.head, block)
    if offset < 0:
        raise ValueError(f"{fmt.name} pages{' of a latent layer' if fmt.latent else ''} have no block {block!r}")
    return _block(pages, offset, dtype, (fmt.num_kv_heads, *shape), fmt.head.end)


def _block(pages: Tensor, offset: int, dtype: torch.dtype, shape: tuple[int, ...], head_bytes: int | None = None) -> Tensor:
    typed = pages.view(dtype)
    size = typed.element_size()
    inner = [1]
    for extent in reversed(shape[1:] if head_bytes is None else shape[2:]):
        inner.insert(0, inner[0] * extent)
    strides = (typed.stride(0), *([] if head_bytes is None else [head_bytes // size]), *inner)
    return typed.as_strided((pages.shape[0], *shape), strides, typed.storage_offset() + offset // size)

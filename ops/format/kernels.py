"""Which formats have CUDA attention kernels; csrc/cuda/kernels.h has the same list. Others run in the torch reference, with one warning."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from .formats import FORMATS, PageFormat

if TYPE_CHECKING:
    import torch

MIXED = ("int8/int4", "int8/int2", "int4/int2", "fp8_e4m3/int4", "bf16/int4")  # K/V, of layers that are not latent
ROPE = ("int8", "int4", "fp8_e4m3")  # of latents with rope_raw
WIDTHS = (32, 64, 128, 576)  # csrc/kernels/tile.cuh; 576 = latent


def _packed(label: str) -> int:
    k, v = label.split("/")
    return FORMATS[k].code | FORMATS[v].code + 1 << 4


KERNEL_FORMATS: dict[str, int] = (
    {name: traits.code for name, traits in FORMATS.items()}
    | {label: _packed(label) for label in MIXED}
    | {f"{name}+rope": FORMATS[name].code | 1 << 8 for name in ROPE}
)
"""PageFormat.label -> the FORMAT of attend_kernel, which is the first number of the layout."""


def widths(label: str) -> tuple[int, ...]:
    return WIDTHS[:-1] if label in MIXED else WIDTHS[-1:] if label.endswith("+rope") else WIDTHS


def kinds(label: str, width: int) -> list[tuple[int, int, str]]:
    """Width, query rows of a block, and whether nothing is asked in its loop: the other template arguments of attend_kernel."""
    grouped = FORMATS[label.removesuffix("+rope").partition("/")[0]].levels > 0
    plain = {128: [(128, 4, "true"), (128, 1, "true")], 576: [] if grouped else [(576, 2, "true")]}
    return [(width, 2 if width == 576 else 4, "false"), *plain.get(width, [])]


TENSOR = ("bf16", "fp16", "int8", "int4", "fp8_e4m3", "int2", "fp4_e2m1", *MIXED)
TENSOR_DIMS = (64, 96, 128, 192, 256)
LATENT = 576  # keys of 512 + 64 columns, of which 512 are the values
LATENT_TENSOR = ("bf16", "fp16", "int8", "int4", "fp8_e4m3", "int2", "fp4_e2m1", *(f"{name}+rope" for name in ROPE))
LATENT_ROWS = 16  # query rows of a block


def tensor_rows(key_bits: int, dim: int) -> tuple[int, ...]:
    """Query rows of a block that there are kernels for: 16 of wider ones, or of coded keys of 128 columns, would be spilled."""
    return (8,) if dim > 128 or (key_bits < 16 and dim == 128) else (8, 16)


def built_dims() -> tuple[int, ...]:
    """The widths that tensor-core kernels are built for: those in PIKV_CUDA_WIDTHS ("64,128"), by default all of TENSOR_DIMS and LATENT."""
    every = (*TENSOR_DIMS, LATENT)
    given = os.environ.get("PIKV_CUDA_WIDTHS")
    if given is None:
        return every
    names = {str(dim): dim for dim in every}
    if set(given.split(",")) - set(names):
        raise ValueError(f"PIKV_CUDA_WIDTHS={given!r}: legal are {', '.join(names)}, with commas between them")
    return tuple(names[name] for name in names if name in given.split(","))


def tensor_kernels(label: str, dims: tuple[int, ...] = TENSOR_DIMS) -> list[str]:
    """The kernels of csrc/kernels/attend_tensor.cuh for a format, of these widths."""
    k, v = FORMATS[label.partition("/")[0]], FORMATS[label.partition("/")[2] or label]
    served = [dim for dim in dims if _lanes_read_whole(dim * k.bits // 8, dim * v.bits // 8)]
    return [f"attend_tensor_kernel<{KERNEL_FORMATS[label]}, {dim}, {rows}>" for dim in served for rows in tensor_rows(k.bits, dim)]


def _lanes_read_whole(k_row_bytes: int, v_row_bytes: int) -> bool:
    """4 lanes read a key, in words; 8 lanes read a value, in bytes."""
    return k_row_bytes % 16 == 0 and v_row_bytes % 8 == 0


def latent_kernel(label: str) -> str:
    """The kernel of csrc/kernels/attend_latent.cuh for one of LATENT_TENSOR."""
    return f"attend_latent_kernel<{KERNEL_FORMATS[label]}>"


def tensor_kernel(fmt: PageFormat, dtype: torch.dtype) -> bool:
    """Whether tensor cores serve queries of this dtype: 16 bits, which raw keys must be of too; latents of 512 + 64 columns, or keys and
    values of one width, of which a lane reads whole words and bytes; built. csrc/cuda/kernels.h has the same."""
    given = {"torch.bfloat16": "bf16", "torch.float16": "fp16"}.get(str(dtype))
    if given is None or (fmt.traits.bits >= 16 and fmt.name != given) or fmt.k_dim not in built_dims():
        return False
    if fmt.latent:
        return fmt.label in LATENT_TENSOR and (fmt.k_dim, fmt.v_dim) == (LATENT, 512)
    whole = _lanes_read_whole(fmt.k_row_bytes, fmt.v_row_bytes)
    return fmt.label in TENSOR and fmt.v_dim == fmt.k_dim and whole and not (fmt.grouped and fmt.group % 16)


def decode_tier(fmt: PageFormat, dtype: torch.dtype) -> str:
    """What serves decode on a GPU: "tensor cores", "fp32" (CUDA cores) or "torch", the reference. PIKV_TENSOR_CORES=0 leaves out the
    first."""
    if os.environ.get("PIKV_TENSOR_CORES") != "0" and tensor_kernel(fmt, dtype):
        return "tensor cores"
    return "fp32" if kernel_width(fmt) else "torch"


def kernel_width(fmt: PageFormat) -> int:
    """The kernels that serve this layout; 0 = none does."""
    if fmt.label not in KERNEL_FORMATS:
        return 0
    if fmt.latent:
        return 576 if fmt.k_dim <= 576 and fmt.v_dim <= 512 else 0
    return next((width for width in (32, 64, 128) if max(fmt.k_dim, fmt.v_dim) <= width), 0)

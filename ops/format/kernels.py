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


TENSOR = ("bf16", "fp16", "int8", "int4", "fp8_e4m3", "int2", *MIXED)
TENSOR_DIMS = (64, 128)


def tensor_rows(key_bits: int, dim: int) -> tuple[int, ...]:
    """Query rows of a block that there are kernels for: 16 of coded keys of 128 columns would be spilled."""
    return (8,) if key_bits < 16 and dim >= 128 else (8, 16)


def tensor_kernels(label: str) -> list[str]:
    """The kernels of csrc/kernels/attend_tensor.cuh for a format."""
    k, v = FORMATS[label.partition("/")[0]], FORMATS[label.partition("/")[2] or label]
    dims = [dim for dim in TENSOR_DIMS if dim * v.bits % 256 == 0]
    return [f"attend_tensor_kernel<{KERNEL_FORMATS[label]}, {dim}, {rows}>" for dim in dims for rows in tensor_rows(k.bits, dim)]


def tensor_kernel(fmt: PageFormat, dtype: torch.dtype) -> bool:
    """Whether tensor cores serve queries of this dtype: 16 bits, which raw keys must be of too; keys and values of a width in TENSOR_DIMS,
    with four bytes for each of the 8 lanes of a value. csrc/cuda/kernels.h has the same."""
    given = {"torch.bfloat16": "bf16", "torch.float16": "fp16"}.get(str(dtype))
    return (
        fmt.label in TENSOR and given is not None and not fmt.latent and fmt.k_dim in TENSOR_DIMS and fmt.v_dim == fmt.k_dim
        and fmt.v_row_bytes % 32 == 0 and (fmt.traits.bits < 16 or fmt.name == given) and not (fmt.grouped and fmt.group % 16)
    )  # fmt: skip


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

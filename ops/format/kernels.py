"""Which formats have CUDA attention kernels; csrc/cuda/kernels.h has the same list. Others run in the torch reference, with one warning."""

from __future__ import annotations

from .formats import FORMATS, PageFormat

MIXED = ("int8/int4", "int8/int2", "int4/int2", "fp8_e4m3/int4", "bf16/int4")  # K/V, of layers that are not latent
ROPE = ("int8", "int4", "fp8_e4m3")  # of latents with rope_raw
WIDTHS = (32, 64, 128, 576)  # csrc/kernels/attend.cuh; 576 = latent


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


def kernel_width(fmt: PageFormat) -> int:
    """The kernels that serve this layout; 0 = none does."""
    if fmt.label not in KERNEL_FORMATS:
        return 0
    if fmt.latent:
        return 576 if fmt.k_dim <= 576 and fmt.v_dim <= 512 else 0
    return next((width for width in (32, 64, 128) if max(fmt.k_dim, fmt.v_dim) <= width), 0)

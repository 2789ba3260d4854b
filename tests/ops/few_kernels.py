"""The CUDA library with the attention kernels of few formats: what the short form compiles, minutes less than the whole.

docs/results/build.json says what all kernels use, and a test says that it is of these sources.
"""

from __future__ import annotations

from dataclasses import replace

from pikv_ds.ops.build import cuda_build
from pikv_ds.ops.build.compile import Library, Source
from pikv_ds.ops.format.kernels import KERNEL_FORMATS

FULLEST = ("int8", "fp4_e2m1", "fp8_e4m3/int4")  # most registers on sm_80, by kind
FULLEST_TENSOR = "fp8_e4m3/int4"
_TEMPLATES = {"attend_kernels": ("launch_attend", "i"), "tensor_kernels": ("launch_tensor", ""), "latent_kernels": ("launch_latent", "")}
"""By source: the function that each format defines, and its arguments between the first and the stream, mangled."""


def few_library() -> Library:
    """Every launcher, the kernels of pages, and those of FULLEST. It loads; a format that was left out stands at address 0."""
    whole = cuda_build.cuda_library()
    kept = {_flag(label) for label in FULLEST}
    chosen = tuple(s for s in whole.sources if not _format(s) or s == cuda_build.tensor_source(FULLEST_TENSOR) or _is_attend(s, kept))
    absent = [f"-Xlinker=--defsym={_symbol(s)}=0" for s in whole.sources if s not in chosen]
    return replace(whole, name="pikv_cuda_few", sources=chosen, link_flags=(*whole.link_flags, *absent))


def _flag(label: str) -> str:
    return f"-DPK_FORMAT={KERNEL_FORMATS[label]}"


def _format(source: Source) -> str:
    return next((flag for flag in source.flags if flag.startswith("-DPK_FORMAT=")), "")


def _is_attend(source: Source, kept: set[str]) -> bool:
    return source.path == "cuda/attend_kernels.cu" and _format(source) in kept


def _symbol(source: Source) -> str:
    function, between = _TEMPLATES[source.path.removeprefix("cuda/").removesuffix(".cu")]
    return f"_ZN4pikv{len(function)}{function}ILi{_format(source).partition('=')[2]}EEEPKcRKNS_6AttendE{between}P11CUstream_st"

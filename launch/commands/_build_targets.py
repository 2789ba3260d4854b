"""What `pikv build` builds: one function per target, each giving its row of the table and, for CUDA, what its kernels use."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pikv_ds import ops
from pikv_ds.ops import library
from pikv_ds.ops.build import load, ptxas
from pikv_ds.ops.build.compile import BuildError, Library, ToolMissing, build, compiler_name, cpu_library, text_digest
from pikv_ds.ops.build.cuda_build import architectures, cuda_library, emu_library, latent_source
from pikv_ds.ops.build.ptxas import KernelUse
from pikv_ds.ops.format.formats import FORMATS
from pikv_ds.ops.format.kernels import KERNEL_FORMATS, LATENT_TENSOR
from pikv_ds.ops.nvrtc import compiler as nvrtc
from pikv_ds.ops.reference import attend as ref_attend
from pikv_ds.ops.reference import formats as ref_formats


def build_target(name: str) -> tuple[dict[str, Any], list[KernelUse]]:
    return _TARGET[name]()


def kernel_table(uses: list[KernelUse]) -> list[dict[str, Any]]:
    """A row per kernel, a column per architecture."""
    formats = {str(code): label for label, code in KERNEL_FORMATS.items()}
    rows: dict[str, dict[str, Any]] = {}
    for use in uses:
        shown = re.sub(r"<(\d+)", lambda match: f"<{formats[match[1]]}", use.kernel)
        row = rows.setdefault(use.kernel, {"kernel": shown})
        row |= {use.arch: use.registers, f"{use.arch} spilled": use.spill_bytes}
    return list(rows.values())


def kernel_digest() -> str:
    """Of the CUDA sources and the headers that kernels see: what a table of registers is about. Launchers include some of csrc/cpu."""
    library = cuda_library()
    sources = (*library.sources, latent_source(LATENT_TENSOR[0]))  # which PIKV_CUDA_WIDTHS may leave out
    return text_digest(replace(library, headers=("include", "kernels", "cuda"), sources=sources)).hexdigest()[:16]


def _failure(error: BuildError) -> str:
    return "missing" if isinstance(error, ToolMissing) else "failed"


def _row(target: str, compiler: str | None) -> dict[str, Any]:
    return {"target": target, "status": "ok", "seconds": 0.0, "compiler": compiler, "largest error": None, "detail": ""}


def _build(library: Library) -> tuple[dict[str, Any], Path | None]:
    row, started = _row(library.name.removeprefix("pikv_"), None), time.monotonic()
    try:
        row["compiler"] = compiler_name(library.compiler)
        path = build(library)
    except BuildError as error:
        return row | {"status": _failure(error), "detail": str(error)}, None
    return row | {"seconds": round(time.monotonic() - started, 1), "detail": path.name}, path


def _compared(row: dict[str, Any], decode: Any, device: str = "cpu") -> dict[str, Any]:
    worst = _largest_error(decode, device)
    return row | {"largest error": float(f"{worst:.2g}"), "status": "ok" if worst < 1e-4 else "wrong results"}


def _cpu() -> tuple[dict[str, Any], list[KernelUse]]:
    row, path = _build(cpu_library())
    if path is not None:
        torch.ops.load_library(str(path))
        row = _compared(row, torch.ops.pikv.decode)
    return row, []


def _emu() -> tuple[dict[str, Any], list[KernelUse]]:
    row, path = _build(emu_library())
    if path is not None:
        load.define_emu()
        row = _compared(row, torch.ops.pikv_emu.decode)
    return row, []


def _cuda() -> tuple[dict[str, Any], list[KernelUse]]:
    row, path = _build(cuda_library())
    if path is None:
        return row, []
    uses = ptxas.parse(path.with_suffix(".log").read_text())
    if not torch.cuda.is_available():
        return _gated(row, uses, "not run here"), uses
    row = _gated(row, uses, f"run on {torch.cuda.get_device_name()}")
    load.load_cuda()
    compared = _compared(row, torch.ops.pikv.decode, "cuda")
    return compared if row["status"] == "ok" else row | {"largest error": compared["largest error"]}, uses


def _nvrtc() -> tuple[dict[str, Any], list[KernelUse]]:
    row, started, uses = _row("nvrtc", None), time.monotonic(), []
    try:
        row["compiler"] = nvrtc.version()
        for arch in architectures():
            uses += nvrtc.check(arch)
    except BuildError as error:
        return row | {"status": _failure(error), "detail": str(error)}, []
    return _gated(row | {"seconds": round(time.monotonic() - started, 1)}, uses, "not run here"), uses


def _gated(row: dict[str, Any], uses: list[KernelUse], where: str) -> dict[str, Any]:
    breaches = [f"{use.kernel} on {use.arch}: {use.breach()}" for use in uses if use.breach()]
    if breaches:
        return row | {"status": "over the limits", "detail": "; ".join(breaches)}
    return row | {"detail": f"{len(uses)} kernels compiled, no spill, at most {max(use.registers for use in uses)} registers; {where}"}


_TARGET = {"cpu": _cpu, "cuda": _cuda, "nvrtc": _nvrtc, "emu": _emu}


def _largest_error(decode, device: str = "cpu") -> float:
    """Largest relative error of a decode op over the formats, against the reference in f64 on the same pages on the host."""
    there = lambda x: None if x is None else x.to(device)  # noqa: E731
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for name in FORMATS:
        fmt = ops.PageFormat(name, 2, 64, 64, 64)
        pages = ops.new_pages(fmt, 4)
        k, v = (torch.randn(4, 2, 64, 64, generator=generator) for _ in "kv")
        ref_formats.encode_pages(pages, fmt, torch.arange(4), k, v)
        q = torch.randn(1, 8, 64, generator=generator).bfloat16()
        table = torch.tensor([[[2, 0, 3]]], dtype=torch.int32)
        lens = torch.tensor([[192 if fmt.grouped else 150]], dtype=torch.int32)
        extra = {"tail": torch.zeros(1, 2, 64, 64), "tail_rows": torch.zeros(1, dtype=torch.int32)} if fmt.grouped else {}
        rows = extra.get("tail"), extra.get("tail_rows")
        out, _, _ = decode(*map(there, (q, pages, table, lens, None, None, *rows)), *library.layout(fmt), 0.125, 0, False, 0)
        expected, _, _ = ref_attend.attend(q.double().unsqueeze(1), pages, fmt, table, lens, scale=0.125, **extra)
        worst = max(worst, ((out.cpu() - expected.squeeze(1)).norm() / expected.norm()).item())
    return worst

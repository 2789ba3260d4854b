"""Our decode over pages of every format."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from pikv_ds import ops
from pikv_ds.ops.build import load
from pikv_ds.ops.reference import formats as ref_formats

from .data import DIM, HEADS, Data
from .worker import Case, serve

FORMATS = ("bf16", "fp8_e4m3", "int8", "fp4_e2m1", "int4")
PAGE_SIZE = 64


def cases(given: Data, threads: int) -> Iterator[Case]:
    torch.set_num_threads(threads)
    q, k, v = (torch.from_numpy(x) for x in given[:3])
    kernel = load.kernel("cpu")
    for name in FORMATS:
        fmt = ops.PageFormat(name, HEADS, DIM, DIM, PAGE_SIZE)
        pages = _filled(fmt, k, v)
        yield _case(f"pikv {name}", kernel, q.bfloat16(), pages, fmt, k.shape[1])
        if fmt.grouped:
            yield _case(f"pikv {name} fast", kernel, q.bfloat16(), pages, replace(fmt, fast=True), k.shape[1])


def _filled(fmt: ops.PageFormat, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    num_pages = k.shape[0] * k.shape[1] // PAGE_SIZE
    pages = ops.new_pages(fmt, num_pages)
    by_page = [x.view(num_pages, PAGE_SIZE, HEADS, DIM).transpose(1, 2) for x in (k, v)]
    for ids in torch.arange(num_pages).split(64):
        ref_formats.encode_pages(pages, fmt, ids, *(x[ids] for x in by_page))
    return pages


def _case(name: str, kernel: str, q: torch.Tensor, pages: torch.Tensor, fmt: ops.PageFormat, context: int) -> Case:
    batch = q.shape[0]
    table = torch.arange(pages.shape[0]).view(batch, 1, -1).int()
    seqlens = torch.full((batch, 1), context, dtype=torch.int32)
    tail = {}
    if fmt.grouped:
        rows = torch.zeros(batch, HEADS, fmt.group, DIM, dtype=torch.bfloat16)
        tail = {"tail": rows, "tail_rows": torch.arange(batch, dtype=torch.int32)}
    last = []

    def call() -> None:
        last[:] = [ops.decode(q, pages, fmt, table, seqlens, scale=DIM**-0.5, **tail)]

    return Case(name, call, lambda: last[0][0], pages.nbytes, f"{kernel}, pages of {PAGE_SIZE}")


if __name__ == "__main__":
    serve(cases)

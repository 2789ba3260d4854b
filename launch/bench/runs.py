"""What `pikv bench ops` times: decode over pages in order and in random order, and torch's attention on the same keys and values."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from pikv_ds import ops
from pikv_ds.ops.build import load
from pikv_ds.ops.memory import aligned_bytes
from pikv_ds.ops.reference import formats as ref_formats

HEADS, GROUP, DIM, PAGE_SIZE = 8, 4, 128, 64
Runs = dict[str, Callable[[], object]]


def paged_runs(name: str, q: Tensor, context: int, generator: torch.Generator) -> tuple[Runs, int]:
    """`<name> contiguous`, `<name> random`, and for a compressed format its two torch baselines; and the bytes that one decode reads.

    Of an integer format also `<name> fast contiguous`, with ops.precision = "fast"; of bf16 `bf16 first contiguous`, by the kernel that
    read pages before there were phases (attend_vnni.cpp is as it was in commit d67f97f), where this processor has it.

    q [B, HEADS * GROUP, DIM]. The baselines read keys and values in order, whatever the order of the pages: the harder comparison.
    """
    batch = q.shape[0]
    keys, _, values = name.partition("/")
    fmt = ops.PageFormat(keys, HEADS, DIM, DIM, PAGE_SIZE, v_name=values or None)
    pages = _filled(fmt, batch * context // PAGE_SIZE, generator)
    ids = torch.arange(pages.shape[0])
    seqlens = torch.full((batch, 1), context, dtype=torch.int32)
    tail = {}
    if fmt.grouped:
        shape = (batch, HEADS, fmt.group, DIM)
        tail = {"tail": torch.zeros(shape, dtype=torch.bfloat16), "tail_rows": torch.arange(batch, dtype=torch.int32)}
    runs: Runs = {}
    for order, listed in (("contiguous", ids), ("random", torch.randperm(len(ids), generator=generator))):
        table = listed.view(batch, 1, -1).int()
        runs[f"{name} {order}"] = lambda table=table: ops.decode(q, pages, fmt, table, seqlens, scale=DIM**-0.5, **tail)
    table = ids.view(batch, 1, -1).int()
    if fmt.grouped and fmt.name == fmt.v_name:
        fast = replace(fmt, fast=True)
        runs[f"{name} fast contiguous"] = lambda: ops.decode(q, pages, fast, table, seqlens, scale=DIM**-0.5, **tail)
    if name == "bf16" and load.ensured("cpu") == "cpu" and load.cpu_kernels()["vnni"]:
        runs["bf16 first contiguous"] = by_kernel("vnni", lambda: ops.decode(q, pages, fmt, table, seqlens, scale=DIM**-0.5))
    if not fmt.raw:
        decoded = lambda: [_dense(x, batch) for x in ops.decode_pages(pages, fmt)]  # noqa: E731
        k, v = decoded()
        runs[f"dequant_sdpa {name}"] = lambda: grouped(q.float(), *decoded())
        runs[f"sdpa_on_dequantised {name}"] = lambda: grouped(q.float(), k, v)
    return runs, pages.nbytes


def by_kernel(kernel: str, call: Callable[[], object]) -> Callable[[], object]:
    """The call with PIKV_KERNEL set."""

    def run() -> object:
        before = os.environ.get("PIKV_KERNEL")
        os.environ["PIKV_KERNEL"] = kernel
        try:
            return call()
        finally:
            os.environ.pop("PIKV_KERNEL")
            if before is not None:
                os.environ["PIKV_KERNEL"] = before

    return run


def dense_runs(q: Tensor, context: int, generator: torch.Generator) -> Runs:
    """sdpa_grouped and sdpa_gqa in bf16 and fp32, on contiguous K and V [B, HEADS, context, DIM] in memory like that of the pages."""
    shape = (q.shape[0], HEADS, context, DIM)
    runs: Runs = {}
    for label, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        k, v = (aligned_bytes(torch.Size(shape).numel() * dtype.itemsize).view(dtype).view(shape) for _ in "kv")
        for request in (*k, *v):
            request.copy_(torch.randn(request.shape, generator=generator))
        query = q.to(dtype)
        runs[f"sdpa_grouped {label}"] = lambda query=query, k=k, v=v: grouped(query, k, v)
        runs[f"sdpa_gqa {label}"] = lambda query=query, k=k, v=v: sdpa(query.unsqueeze(2), k, v, enable_gqa=True)
    return runs


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The query heads of a kv head as rows of one query, so that K and V are read once. q [B, Hq, D], k and v [B, H, L, D]."""
    return sdpa(q.view(q.shape[0], k.shape[1], -1, q.shape[-1]), k, v)


def _filled(fmt: ops.PageFormat, num_pages: int, generator: torch.Generator) -> Tensor:
    pages = ops.new_pages(fmt, num_pages)
    for ids in torch.arange(num_pages).split(64):
        k, v = (torch.randn(len(ids), HEADS, PAGE_SIZE, DIM, generator=generator) for _ in "kv")
        ref_formats.encode_pages(pages, fmt, ids, k, v)
    return pages


def _dense(x: Tensor, batch: int) -> Tensor:
    """[pages, H, page_size, D] of pages in order -> [B, H, L, D]."""
    return x.view(batch, -1, *x.shape[1:]).transpose(1, 2).flatten(2, 3)

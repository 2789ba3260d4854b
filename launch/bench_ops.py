"""`pikv bench ops` on the CPU: decode over pages against torch's attention, interleaved, on the same data and threads.

Baselines, all torch:
    sdpa_grouped         K/V contiguous [B, H, L, D], queries of a kv head as rows of one query: the honest one; the faster of bf16, fp32
    sdpa_gqa             the same with enable_gqa=True, as one would first write it; the faster of bf16 and fp32
    dequant_sdpa         pages decoded by the torch reference, then sdpa_grouped in fp32: what compression costs without a kernel
    sdpa_on_dequantised  sdpa_grouped in fp32 on keys and values that have been decoded before the clock starts
    own_bf16             decode over bf16 pages
    contiguous           the same decode with its pages in order, beside pages in random order
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import Any

from pikv_ds.launch.output import print_table, write_json

FORMATS = ("bf16", "int8", "int4", "fp8_e4m3")
HEADS, GROUP, DIM = 8, 4, 128
SHAPES = ((1, 4096), (1, 32768), (8, 8192))  # batch, context


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="one small shape, 3 repeats: does it run")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: see launch/bench_ops_cuda.py (default cpu)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="torch threads (default 1)")
    parser.add_argument("--repeats", type=int, default=9, metavar="N", help="runs of each, interleaved (default 9)")


def run(args: argparse.Namespace) -> int:
    import torch

    if args.device == "cuda":
        from pikv_ds.launch import bench_ops_cuda

        return bench_ops_cuda.run(args)
    torch.set_num_threads(args.threads)
    shapes, repeats = (((1, 2048),), 3) if args.quick else (SHAPES, args.repeats)
    rows = []
    for batch, context in shapes:
        for order in ("contiguous", "random"):
            rows += _rows(batch, context, order, args.threads, repeats)
    shown = ("op", "format", "pages", "batch", "context_tokens", "ms", "cpu_ms", "baseline", "baseline_ms", "ratio", "gbps", "stream_gbps")
    print_table(
        f"Decode, {HEADS * GROUP} query heads, {HEADS} kv heads of {DIM}, {args.threads} thread(s): median of {repeats}, interleaved",
        [{key: scalar(row[key]) for key in shown} for row in rows],
    )
    noisy = [row for row in rows if row["cpu_ms"] < 0.9 * row["ms"] * row["threads"]]
    if noisy:
        print(f"{len(noisy)} of {len(rows)} rows had less than 90 % of their cores: other work ran here; ratios of cpu_ms are safer")
    write_json(args.json, "bench ops", rows)
    return 0


def _rows(batch: int, context: int, order: str, threads: int, repeats: int) -> list[dict[str, Any]]:
    import torch

    generator = torch.Generator().manual_seed(1)
    q = torch.randn(batch, HEADS * GROUP, DIM, generator=generator).bfloat16()
    runs, sizes = {}, {}
    for name in FORMATS:
        runs[name], in_order, sizes[name], decoded = _paged(name, q, batch, context, order, generator)
        if order == "random":
            runs[f"contiguous {name}"] = in_order
        else:
            runs |= _on_decoded(name, q, decoded, batch, context)
        del decoded
    if order == "contiguous":
        runs |= _dense(q, batch, context, generator)
    stream = torch.ones(1 << (24 if context <= 2048 else 29), dtype=torch.uint8)
    runs["stream"] = lambda: torch.ops.pikv.checksum(stream)
    wall, cpu = _measure(runs, repeats)
    gbps = stream.nbytes / wall["stream"] / 1e6
    common = {
        "op": "decode",
        "group": GROUP,
        "pages": order,
        "batch": batch,
        "context_tokens": context,
        "threads": threads,
        "repeats": repeats,
    }
    rows = []
    for name in FORMATS:
        for baseline, ran in _baselines(name, wall, order):
            rows.append({
                **common, "format": name, "ms": wall[name], "cpu_ms": cpu[name], "baseline": baseline, "baseline_as": ran,
                "baseline_ms": wall[ran], "baseline_cpu_ms": cpu[ran], "ratio": wall[ran] / wall[name], "cpu_ratio": cpu[ran] / cpu[name],
                "bytes": sizes[name], "gbps": sizes[name] / wall[name] / 1e6, "stream_gbps": gbps,
            })  # fmt: skip
    return rows


def _baselines(name: str, wall: dict[str, float], order: str) -> list[tuple[str, str]]:
    faster = lambda kind: min((f"{kind} bf16", f"{kind} fp32"), key=wall.__getitem__)  # noqa: E731
    if order == "random":
        return [("contiguous", f"contiguous {name}"), *([] if name == "bf16" else [("own_bf16", "bf16")])]
    pairs = [("sdpa_grouped", faster("sdpa_grouped")), ("sdpa_gqa", faster("sdpa_gqa"))]
    if name != "bf16":
        pairs += [("dequant_sdpa", f"dequant_sdpa {name}"), ("sdpa_on_dequantised", f"sdpa_on_dequantised {name}"), ("own_bf16", "bf16")]
    return pairs


def _paged(name, q, batch, context, order, generator):
    import torch

    from pikv_ds import ops
    from pikv_ds.ops import ref_formats

    fmt = ops.PageFormat(name, HEADS, DIM, DIM, 64)
    num_pages = batch * context // fmt.page_size
    pages = ops.new_pages(fmt, num_pages)
    for start in range(0, num_pages, 64):
        ids = torch.arange(start, min(start + 64, num_pages))
        k = torch.randn(len(ids), HEADS, fmt.page_size, DIM, generator=generator)
        v = torch.randn(len(ids), HEADS, fmt.page_size, DIM, generator=generator)
        ref_formats.encode_pages(pages, fmt, ids, k, v)
    ids = torch.arange(num_pages)
    in_order = ids.view(batch, 1, -1).int()
    table = ids[torch.randperm(num_pages, generator=generator)].view(batch, 1, -1).int() if order == "random" else in_order
    seqlens = torch.full((batch, 1), context, dtype=torch.int32)
    tail = {}
    if fmt.grouped:
        tail = {
            "tail": torch.zeros(batch, HEADS, fmt.group, DIM, dtype=torch.bfloat16),
            "tail_rows": torch.arange(batch, dtype=torch.int32),
        }

    def reading(block_table):
        return lambda: ops.decode(q, pages, fmt, block_table, seqlens, scale=DIM**-0.5, **tail)

    return reading(table), reading(in_order), pages.nbytes, (pages, fmt)


def _contiguous(pages, fmt, batch, context):
    """k, v [B, H, L, D] f32 of pages in order."""
    from pikv_ds.ops import ref_formats

    per_request = lambda x: x.view(batch, -1, HEADS, fmt.page_size, DIM).transpose(1, 2).reshape(batch, HEADS, context, DIM)  # noqa: E731
    return [per_request(x) for x in ref_formats.decode_pages(pages, fmt)]


def _on_decoded(name, q, decoded, batch, context):
    if name == "bf16":
        return {}
    pages, fmt = decoded
    k, v = _contiguous(pages, fmt, batch, context)
    return {
        f"dequant_sdpa {name}": lambda: _grouped(q.float(), *_contiguous(pages, fmt, batch, context)),
        f"sdpa_on_dequantised {name}": lambda: _grouped(q.float(), k, v),
    }


def _dense(q, batch, context, generator):
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    from pikv_ds.ops.memory import aligned_bytes

    runs = {}
    for label, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        k, v = (aligned_bytes(batch * HEADS * context * DIM * dtype.itemsize).view(dtype).view(batch, HEADS, context, DIM) for _ in "kv")
        for x in (k, v):
            for request in x:
                request.copy_(torch.randn(request.shape, generator=generator))
        query = q.to(dtype)
        runs[f"sdpa_grouped {label}"] = lambda query=query, k=k, v=v: _grouped(query, k, v)
        runs[f"sdpa_gqa {label}"] = lambda query=query, k=k, v=v: sdpa(query.unsqueeze(2), k, v, enable_gqa=True)
    return runs


def _grouped(q, k, v):
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    return sdpa(q.view(q.shape[0], HEADS, GROUP, DIM), k, v)


def _measure(runs: dict[str, Any], repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """Median wall and CPU ms of each; all run once before, then in turns."""
    for call in runs.values():
        call()
    wall, cpu = {name: [] for name in runs}, {name: [] for name in runs}
    for _ in range(repeats):
        for name, call in runs.items():
            started, cpu_started = time.perf_counter(), time.process_time()
            call()
            wall[name].append(1e3 * (time.perf_counter() - started))
            cpu[name].append(1e3 * (time.process_time() - cpu_started))
    return {name: median(values) for name, values in wall.items()}, {name: median(values) for name, values in cpu.items()}


def scalar(value: Any) -> Any:
    return float(f"{value:.3g}") if isinstance(value, float) else value

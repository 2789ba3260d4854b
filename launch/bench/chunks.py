"""`pikv bench chunks`: a chunk of new tokens over stored pages: `prefill_cached` beside torch's flash on dense keys, in turns.

One request, 32 query and 8 KV heads of 128, one thread, CPU time. Flash has the query heads of a KV head as rows of one query, so that it
reads keys once as well. Columns:
    stored, chunk        tokens
    ms, flash_ms         medians of the rounds; flash in the dtype of the model, which is fp32 or fp16 for those formats, else bf16
    ms / flash           median of the rounds' ratios, and their 20th and 80th percentile; below 1, reading pages is faster
    tiles_ms             the same by the kernel "vnni", which takes a chunk 16 tokens at a time; where this processor has it
    among_ms             what the new tokens among themselves take, by `sdpa_lse`: torch's attention in either case
    rms                  relative RMS error of out against fp64 on what the pages hold, of the first 32 tokens of the chunk
"""

from __future__ import annotations

import argparse
from statistics import median, quantiles
from typing import Any

from pikv_ds.launch.output import print_table, write_json

HEADS, GROUP, DIM = 8, 4, 128
FORMATS = ("bf16", "fp32", "fp16", "fp8_e4m3", "fp4_e2m1", "int8", "int4")
DTYPES = {"fp32": "float32", "fp16": "float16"}
_SHOWN = ("format", "stored", "chunk", "ms", "flash_ms", "ms / flash", "p20", "p80", "tiles_ms", "among_ms", "rms")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stored", type=int, default=8192, metavar="L", help="tokens in the pages (default 8192)")
    parser.add_argument("--chunk", type=int, nargs="+", default=[512, 2048], metavar="T", help="new tokens (default 512, then 2048)")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS, metavar="NAME", help="(default: all)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="rounds (default 5)")


def run(args: argparse.Namespace) -> int:
    import torch

    torch.set_num_threads(1)
    rows = [_row(name, args.stored, chunk, args.repeats) for chunk in args.chunk for name in args.formats]
    title = f"chunks over {args.stored} stored tokens, {GROUP * HEADS} query and {HEADS} KV heads of {DIM}, 1 thread, CPU time"
    print_table(title, [{key: _short(row[key]) for key in _SHOWN} for row in rows])
    command = f"bench chunks --stored {args.stored} --chunk {' '.join(map(str, args.chunk))} --repeats {args.repeats}"
    write_json(args.json, command + ("" if args.formats == list(FORMATS) else f" --formats {' '.join(args.formats)}"), rows)
    return 0


def _row(name: str, stored: int, chunk: int, repeats: int) -> dict[str, Any]:
    import torch

    from pikv_ds import ops
    from pikv_ds.ops.build import load
    from pikv_ds.ops.format.formats import FORMATS as TRAITS
    from pikv_ds.ops.reference import attend as reference

    from .errors import _rms, store_pages
    from .ops import measure
    from .runs import by_kernel

    generator, dtype = torch.Generator().manual_seed(chunk), getattr(torch, DTYPES.get(name, "bfloat16"))
    draw = lambda *shape: torch.randn(shape, generator=generator).to(dtype)  # noqa: E731
    fmt = ops.PageFormat(name, HEADS, DIM, DIM, TRAITS[name].preferred_page_size)
    q, k, v = draw(1, chunk, HEADS * GROUP, DIM), draw(stored, HEADS, DIM), draw(stored, HEADS, DIM)
    new_k, new_v = draw(1, HEADS, chunk, DIM), draw(1, HEADS, chunk, DIM)
    pages, table, seqlens, tail = store_pages(fmt, k, v)
    asked = (stored + torch.arange(chunk)).int().view(1, -1)
    paged = lambda: ops.prefill_cached(q, pages, fmt, table, seqlens, asked, scale=DIM**-0.5, **tail)  # noqa: E731
    grouped = q.view(chunk, HEADS, GROUP, DIM).permute(1, 2, 0, 3).reshape(1, HEADS, GROUP * chunk, DIM)
    dense = [x.transpose(0, 1).unsqueeze(0).contiguous() for x in (k, v)]
    runs = {
        "paged": paged,
        "flash": lambda: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(grouped, *dense),
        "among": lambda: ops.sdpa_lse(q.transpose(1, 2), new_k, new_v, scale=DIM**-0.5, causal=True),
    }
    if load.ensured("cpu") == "cpu" and load.cpu_kernels()["vnni"]:
        runs["tiles"] = by_kernel("vnni", paged)
    times = measure(runs, repeats)
    ratios = [a / b for a, b in zip(times["paged"].cpu, times["flash"].cpu, strict=True)]
    fifths = quantiles(ratios, n=5) if repeats > 1 else ratios * 4
    few = slice(0, 32)
    exact, _, _ = reference.attend(
        q[:, few].double(), pages, fmt, table, seqlens, scale=DIM**-0.5, q_positions=asked[:, few],
        **{key: value.double() if value.is_floating_point() else value for key, value in tail.items()},
    )  # fmt: skip
    return {
        "format": name, "stored": stored, "chunk": chunk, "threads": 1, "repeats": repeats, "kernel": load.kernel("cpu"),
        "ms": times["paged"].cpu_ms, "flash_ms": times["flash"].cpu_ms, "ms / flash": median(ratios), "p20": fifths[0], "p80": fifths[3],
        "tiles_ms": times["tiles"].cpu_ms if "tiles" in times else None, "among_ms": times["among"].cpu_ms,
        "rms": _rms(paged()[0][:, few], exact),
    }  # fmt: skip


def _short(value: Any) -> Any:
    return float(f"{value:.3g}") if isinstance(value, float) else value

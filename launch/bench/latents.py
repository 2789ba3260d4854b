"""`pikv bench latents`: decode over MLA latents of DeepSeek-V3's geometry (512 + 64, one request) in each record format, one thread.

All formats and both kinds of kernels run in turns in one process; medians of the rounds. Columns:
    bytes_per_token      of a record, without positions
    plain_ms, hand_ms    CPU time of one decode: plain C++ for AVX512, and the kernels by hand (AVX512 with VNNI)
    plain / hand         above 1, the kernels by hand are faster
    bf16 / hand          bf16 by hand over this format by hand: above 1, this format is faster
"""

from __future__ import annotations

import argparse
import os
import time
from statistics import median

from pikv_ds.launch.output import print_table, write_json

K_DIM, V_DIM = 576, 512
FORMATS = ("bf16", "int8+rope", "int8", "int4+rope", "int4", "fp8_e4m3+rope", "fp8_e4m3", "fp4_e2m1+rope", "int2+rope")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--context", type=int, default=8192, metavar="T", help="tokens (default 8192)")
    parser.add_argument("--heads", type=int, default=16, metavar="N", help="query heads, all on the one latent (default 16)")
    parser.add_argument("--repeats", type=int, default=9, metavar="N", help="rounds (default 9)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: what serves there, by its own clock (default cpu)")


def run(args: argparse.Namespace) -> int:
    import torch

    from pikv_ds.ops.build import load

    if args.device == "cuda":
        return _on_cuda(args)
    torch.set_num_threads(1)
    if load.ensured("cpu") != "cpu" or not load.cpu_kernels()["vnni"]:
        print("this needs the CPU ops and a processor with AVX512 and VNNI")
        return 1
    decodes = {name: _decode(name, args.context, args.heads, "cpu") for name in FORMATS}
    times: dict[tuple[str, str], list[float]] = {}
    before = os.environ.get("PIKV_CPU")
    for _ in range(args.repeats):
        for name, (decode, _) in decodes.items():
            for cap in ("avx512", "vnni"):
                os.environ["PIKV_CPU"] = cap
                started = time.thread_time()
                decode()
                times.setdefault((name, cap), []).append(1e3 * (time.thread_time() - started))
    os.environ.pop("PIKV_CPU")
    if before is not None:
        os.environ["PIKV_CPU"] = before
    over = lambda a, b: median(x / y for x, y in zip(times[a], times[b], strict=True))  # noqa: E731
    rows = [
        {
            "format": name, "bytes_per_token": nbytes, "plain_ms": median(times[name, "avx512"]), "hand_ms": median(times[name, "vnni"]),
            "plain / hand": over((name, "avx512"), (name, "vnni")), "bf16 / hand": over(("bf16", "vnni"), (name, "vnni")),
        }
        for name, (_, nbytes) in decodes.items()
    ]  # fmt: skip
    title = f"decode over latents of {V_DIM} + {K_DIM - V_DIM}, {args.context} tokens, {args.heads} query heads, 1 thread"
    print_table(title, [{key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()} for row in rows])
    write_json(args.json, f"bench latents --context {args.context} --heads {args.heads}", rows)
    return 0


def _on_cuda(args: argparse.Namespace) -> int:
    """ms of a decode by each format, and bf16's time over it."""
    from pikv_ds.ops.build import load

    from .clock import Clock

    clock, rows = Clock("cuda"), []
    for name in FORMATS:
        decode, nbytes = _decode(name, args.context, args.heads, "cuda")
        rows.append({"format": name, "bytes_per_token": nbytes, "ms": median(clock.each(clock.graphed(decode), args.repeats))})
        rows[-1]["bf16 / ms"] = rows[0]["ms"] / rows[-1]["ms"]
    title = f"decode over latents of {V_DIM} + {K_DIM - V_DIM}, {args.context} tokens, {args.heads} query heads, {load.ensured('cuda')}"
    print_table(title, [{key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()} for row in rows])
    write_json(args.json, f"bench latents --device cuda --context {args.context} --heads {args.heads}", rows)
    print("; ".join(f"{row['format']} {row['bf16 / ms']:.2f}x bf16" for row in rows[1:]))
    return 0


def _decode(name: str, context: int, heads: int, device: str):
    """What is timed, and the bytes of a token."""
    import torch

    from pikv_ds import ops
    from pikv_ds.ops.format.formats import FORMATS as TRAITS

    from .errors import store_pages

    keys, generator = name.removesuffix("+rope"), torch.Generator().manual_seed(0)
    size = TRAITS[keys].preferred_page_size
    fmt = ops.PageFormat(keys, 1, K_DIM, V_DIM, size, latent=True, rope_raw=name.endswith("+rope"))
    k = (torch.randn(context, 1, K_DIM, generator=generator) + torch.randn(1, 1, K_DIM, generator=generator)).bfloat16()
    pages, table, seqlens, tail = store_pages(fmt, k.to(device), k[..., :V_DIM].to(device))
    q = torch.randn(1, heads, K_DIM, generator=generator).bfloat16().to(device)
    return lambda: ops.decode(q, pages, fmt, table, seqlens, scale=K_DIM**-0.5, **tail), fmt.bytes_per_token

"""`pikv bench select`: a decode step of some wide layers that reads some of the pages, against the same step reading all of them.

A step is begin_step, PiKVCache.attend of one token in every layer, end_step: entries stored, bounds of their pages widened, pages
scored and chosen, attention. Both caches hold the same entries; keys, values and queries are random, so this says nothing about quality.
"""

from __future__ import annotations

import argparse
import itertools
import time
from statistics import median, quantiles
from typing import Any

from pikv_ds.launch.output import print_table, write_json

HEADS, GROUP, DIM = 8, 4, 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--context", type=int, default=32768, metavar="N", help="tokens in the cache (default 32768)")
    parser.add_argument("--ratio", type=float, default=1 / 16, metavar="X", help="routing.budget_ratio (default 0.0625)")
    parser.add_argument("--router", default="bounds", metavar="NAME", help="routing.method, one that takes a budget (default bounds)")
    parser.add_argument("--codecs", nargs="+", default=["none", "int8"], metavar="NAME", help="compression.method (default none int8)")
    parser.add_argument("--page-size", type=int, nargs="+", default=[32, 64], metavar="P", help="legal ones are measured (default 32 64)")
    parser.add_argument(
        "--block-size", type=int, nargs="+", default=[0], metavar="B", help="routing.block_size, 0 = whole pages (default 0)"
    )
    parser.add_argument("--metadata", default="bf16", metavar="DTYPE", help="of the router bounds (default bf16)")
    parser.add_argument("--layers", type=int, default=2, metavar="L", help="layers of a step (default 2)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the caches lie (default cpu)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="torch threads (default 1)")
    parser.add_argument("--steps", type=int, default=21, metavar="N", help="timed steps of each, in turns (default 21)")


def run(args: argparse.Namespace) -> int:
    import torch

    torch.set_num_threads(args.threads)
    rows = []
    for codec in args.codecs:
        for page_size, block_size in itertools.product(args.page_size, args.block_size):
            if (codec == "none" or page_size % 64 == 0) and page_size % (block_size or page_size) == 0:
                rows.append(_row(args, codec, page_size, block_size))
    shown = (
        "router",
        "codec",
        "page_size",
        "block_size",
        "context_tokens",
        "entries_read",
        "all_ms",
        "ms",
        "ratio",
        "ratio_p20",
        "cpu_ratio",
        "kv_bytes_ratio",
    )
    print_table(
        f"Step of {args.layers} layer(s), {HEADS * GROUP} query heads, {HEADS} kv heads of {DIM}, bf16, {args.threads} thread(s)",
        [{key: float(f"{row[key]:.4g}") if isinstance(row[key], float) else row[key] for key in shown} for row in rows],
    )
    write_json(args.json, "bench select", rows)
    print("; ".join(f"{row['codec']}, {_pieces(row)}: {row['ratio']:.2f} times as fast as reading all" for row in rows))
    return 0


def _pieces(row: dict[str, Any]) -> str:
    return f"blocks of {row['block_size']}" if row["block_size"] else f"pages of {row['page_size']}"


def _row(args: argparse.Namespace, codec: str, page_size: int, block_size: int) -> dict[str, Any]:
    import torch

    from pikv_ds.cache.stats import stats

    from .clock import Clock

    generator = torch.Generator().manual_seed(0)
    shape = lambda tokens, heads: torch.randn(1, tokens, heads, DIM, generator=generator).bfloat16().to(args.device)  # noqa: E731
    clock = Clock(args.device)
    full, chosen = (_cache(args, codec, page_size, block_size, selects) for selects in (False, True))
    k, v = shape(args.context, HEADS), shape(args.context, HEADS)
    for cache in (full, chosen):
        _step(cache, shape(1, HEADS * GROUP).expand(-1, args.context, -1, -1), k, v, 0)
    times = {"all": [], "some": []}
    cpu = {"all": [], "some": []}
    for step in range(args.steps + 2):
        q, k, v = shape(1, HEADS * GROUP), shape(1, HEADS), shape(1, HEADS)
        for name, cache in (("all", full), ("some", chosen)) if step % 2 else (("some", chosen), ("all", full)):
            started, cpu_started = clock.now(), time.process_time()
            _step(cache, q, k, v, args.context + step)
            if step >= 2:
                cpu[name].append(1e3 * (time.process_time() - cpu_started))
                times[name].append(1e3 * (clock.now() - started))
    ratios = [every / some for every, some in zip(times["all"], times["some"], strict=True)]
    low, _, _, high = quantiles(ratios, n=5)
    full_stats, own_stats = stats(full, 1, args.context), stats(chosen, 1, args.context)
    return {
        "router": args.router, "codec": codec, "page_size": page_size, "block_size": block_size, "context_tokens": args.context,
        "threads": args.threads,
        "layers": args.layers, "steps": args.steps, "budget_ratio": args.ratio, "device": args.device,
        "entries_read": own_stats["entries_read"] / own_stats["entries_visible"],
        "all_ms": median(times["all"]), "ms": median(times["some"]), "ratio": median(ratios), "ratio_p20": low, "ratio_p80": high,
        "all_cpu_ms": median(cpu["all"]), "cpu_ms": median(cpu["some"]), "cpu_ratio": median(cpu["all"]) / median(cpu["some"]),
        "kv_bytes_ratio": own_stats["kv_bytes_allocated"] / full_stats["kv_bytes_allocated"], "attention_impl": own_stats["attention_impl"],
    }  # fmt: skip


def _cache(args: argparse.Namespace, codec: str, page_size: int, block_size: int, selects: bool):
    import torch

    from pikv_ds.cache.cache import PiKVCache
    from pikv_ds.config.pikv import PiKVConfig
    from pikv_ds.spec import LayerSpec

    block: dict[str, Any] = {"page_size": page_size, "compression": {"method": codec}}
    if selects:
        block["routing"] = {"method": args.router, "budget_ratio": args.ratio, "block_size": block_size or None}
        if args.router == "bounds":
            block["routing"]["metadata"] = args.metadata
    layers = [LayerSpec(layer_idx=i, num_kv_heads=HEADS, k_dim=DIM, v_dim=DIM) for i in range(args.layers)]
    return PiKVCache(layers, PiKVConfig(**block), num_experts=1, dtype=torch.bfloat16, device=torch.device(args.device))


def _step(cache, q, k, v, stored: int) -> None:
    import torch

    from pikv_ds.step.step import LocalStep

    tokens = k.shape[1]
    positions = torch.arange(stored, stored + tokens, dtype=torch.int32, device=k.device).view(1, -1)
    cache.begin_step(
        LocalStep(
            num_rows=1, num_columns=tokens, num_new=[tokens], parent=[0 if stored else -1], keep=[stored], positions=positions, digest=0,
            identity=stored > 0, fresh=stored == 0,
        )
    )  # fmt: skip
    for layer in range(len(cache.layers)):
        cache.attend(layer, q, k, v, scale=DIM**-0.5, v_dim=DIM, expert_ids=None)
    cache.end_step()

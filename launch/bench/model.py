"""`pikv bench model`: decode steps over formats, contexts and batches, and the source paper's latency model fitted to them.

A step is begin_step, PiKVCache.attend of one token per request in every layer, end_step; keys, values and queries are random. Formats of
one context and batch are timed in turns.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

from pikv_ds.launch.output import print_table, write_json

from .latency_model import Point, fit, predict

HEADS, GROUP, DIM = 8, 4, 128
RAW = ("float32", "bfloat16")
MOST_TOKENS = 1 << 16  # in the cache; a context and batch that hold more are left out
QUICK = {"context": [256, 1024], "batch": [1, 2], "layers": 1, "steps": 3}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--formats", nargs="+", default=[*RAW, "int8", "int4", "fp8_e4m3"], metavar="NAME", help="dtypes of raw entries, and codecs"
    )
    parser.add_argument("--context", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768], metavar="N", help="tokens per request")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4], metavar="B", help="requests (default 1 2 4)")
    parser.add_argument("--layers", type=int, default=1, metavar="L", help="layers of a step (default 1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the cache lies (default cpu)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="torch threads (default 1)")
    parser.add_argument("--steps", type=int, default=21, metavar="N", help="timed steps of each, in turns (default 21)")
    parser.add_argument("--quick", action="store_true", help="short contexts, three steps: shows that it runs")
    parser.add_argument("--plot", metavar="FILE", help="write measured against fitted times as a PNG")


def run(args: argparse.Namespace) -> int:
    import torch

    if args.quick:
        vars(args).update(QUICK)
    torch.set_num_threads(args.threads)
    rows = [
        row for batch in args.batch for context in args.context if batch * context <= MOST_TOKENS for row in _rows(args, context, batch)
    ]
    points = [Point(row["format"], row["format"] not in RAW, row["batch"], row["stored_bytes"], row["step_ms"] / 1e3) for row in rows]
    models = fit(points)
    for name, model in models.items():
        for row, point, error in zip(rows, points, model["relative_errors"], strict=True):
            row |= {f"{name}_ms": 1e3 * predict(model, point), f"{name}_error": error}
    shown = ("format", "context_tokens", "batch", "stored_bytes", "step_ms", "paper_ms", "paper_error", "extended_ms", "extended_error")
    title = f"Step of {args.layers} layer(s), {HEADS * GROUP} query heads, {HEADS} kv heads of {DIM}, {args.threads} thread(s)"
    print_table(title, [{key: _round(row[key]) for key in shown} for row in rows])
    summary = [{"model": name} | {key: value for key, value in model.items() if key != "relative_errors"} for name, model in models.items()]
    print_table("T = S / beta + (eta / 2) S / gamma, S = stored bytes read", [{k: _round(v) for k, v in line.items()} for line in summary])
    write_json(args.json, "bench model", rows, fit=summary)
    slowest = max(row["step_ms"] for row in rows)
    print(
        f"{len(rows)} steps timed, {min(row['step_ms'] for row in rows):.3g} to {slowest:.3g} ms by {rows[0]['attention_impl']} and others"
    )
    if args.plot:
        draw(Path(args.plot), rows)
    return 0


def _rows(args: argparse.Namespace, context: int, batch: int) -> list[dict[str, Any]]:
    import torch

    from pikv_ds.cache.inspect import CacheProbe
    from pikv_ds.cache.stats import stats

    from .clock import Clock

    generator = torch.Generator().manual_seed(0)
    random = lambda tokens, heads: torch.randn(batch, tokens, heads, DIM, generator=generator).to(args.device)  # noqa: E731
    clock, caches = Clock(args.device), {name: _cache(name, args.layers, args.device) for name in args.formats}
    k, v = random(context, HEADS), random(context, HEADS)
    for cache in caches.values():
        _step(cache, k[..., :1, :].expand(-1, -1, HEADS * GROUP, -1), k, v, 0)
    times: dict[str, list[float]] = {name: [] for name in caches}
    for step in range(args.steps + 2):
        q, k, v = random(1, HEADS * GROUP), random(1, HEADS), random(1, HEADS)
        for name in caches if step % 2 else reversed(caches):
            started = clock.now()
            _step(caches[name], q, k, v, context + step)
            if step >= 2:
                times[name].append(1e3 * (clock.now() - started))
    rows = []
    for name, cache in caches.items():
        fmt = CacheProbe(cache).formats[0]
        stored = round(args.layers * batch * context * fmt.bytes_per_token)
        rows.append(
            {
                "format": name, "context_tokens": context, "batch": batch, "layers": args.layers, "threads": args.threads,
                "device": args.device,
                "steps": args.steps, "stored_bytes": stored, "step_ms": median(times[name]), "step_ms_least": min(times[name]),
                "attention_impl": stats(cache, batch, context)["attention_impl"],
            }
        )  # fmt: skip
    return rows


def _cache(name: str, num_layers: int, device: str):
    import torch

    from pikv_ds.cache.cache import PiKVCache
    from pikv_ds.config.pikv import PiKVConfig
    from pikv_ds.spec import LayerSpec

    layers = [LayerSpec(layer_idx=i, num_kv_heads=HEADS, k_dim=DIM, v_dim=DIM) for i in range(num_layers)]
    dtype = getattr(torch, name) if name in RAW else torch.bfloat16
    config = PiKVConfig(compression={"method": "none" if name in RAW else name})
    return PiKVCache(layers, config, num_experts=1, dtype=dtype, device=torch.device(device))


def _step(cache, q, k, v, stored: int) -> None:
    import torch

    from pikv_ds.step.step import LocalStep

    rows, tokens = k.shape[:2]
    positions = torch.arange(stored, stored + tokens, dtype=torch.int32, device=k.device).expand(rows, -1).contiguous()
    q, k, v = (x.to(cache.dtype) for x in (q, k, v))
    cache.begin_step(
        LocalStep(
            num_rows=rows, num_columns=tokens, num_new=[tokens] * rows, parent=list(range(rows)) if stored else [-1] * rows,
            keep=[stored] * rows, positions=positions, digest=0, identity=stored > 0, fresh=stored == 0,
        )
    )  # fmt: skip
    for layer in range(len(cache.layers)):
        cache.attend(layer, q, k, v, scale=DIM**-0.5, v_dim=DIM, expert_ids=None)
    cache.end_step()


def draw(file: Path, rows: list[dict[str, Any]]) -> None:
    """Measured against fitted milliseconds, both models, a colour per format."""
    from pikv_ds.launch.evaluation.report import check_matplotlib

    check_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    for axis, name in zip(figure.subplots(1, 2), ("paper", "extended"), strict=True):
        for idx, form in enumerate(dict.fromkeys(row["format"] for row in rows)):
            own = [row for row in rows if row["format"] == form]
            axis.loglog([row["step_ms"] for row in own], [row[f"{name}_ms"] for row in own], "o", color=f"C{idx}", markersize=4, label=form)
        ends = [min(row["step_ms"] for row in rows), max(row["step_ms"] for row in rows)]
        axis.loglog(ends, ends, color="0.6", linewidth=1)
        axis.set(xlabel="measured step, ms", ylabel="fitted, ms", title=name)
        axis.legend(fontsize=7)
    figure.savefig(file, dpi=110)


def _round(value: Any) -> Any:
    if isinstance(value, dict):
        return ", ".join(f"{name} {number:.2f}" for name, number in value.items())
    return float(f"{value:.4g}") if isinstance(value, float) else value

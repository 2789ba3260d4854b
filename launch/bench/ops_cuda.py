"""`pikv bench ops --device cuda`: decode over pages beside the attention of torch, FlashInfer and flash-attn on the same keys and values.

Times are CUDA events around one call, interleaved, with L2 overwritten before each; pages are in random order. The copy rate of the same
run, bytes read plus bytes written, is what `share` compares with. Has not been run on a device yet.

Baselines (bf16, those that are there):
    own_bf16    decode over bf16 pages
    sdpa        contiguous K/V [B, H, L, D], enable_gqa=True
    flex        torch flex_attention, compiled, enable_gqa=True, on the same
    flashinfer  BatchDecodeWithPagedKVCacheWrapper, HND pages of 16 tokens
    flashinfer_in_place  the same kernels over our own bf16 pages, as strided views (ops/backends/flashinfer.py)
    flash_attn  flash_attn_with_kvcache, pages of 256 tokens
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from pikv_ds import ops
from pikv_ds.launch.output import print_table, write_json
from pikv_ds.ops.backends import flashinfer as over_pages
from pikv_ds.ops.build import load
from pikv_ds.ops.reference import formats as ref_formats

from .ops import FORMATS, scalar
from .runs import DIM, GROUP, HEADS

SHAPES = ((32, 8192), (8, 32768), (1, 262144))  # batch, context: K and V are 1 GiB in bf16
QUICK = ((4, 1024),)
PAGE = 64


def run(args: argparse.Namespace) -> int:
    rows = []
    for batch, context in QUICK if args.quick else SHAPES:
        rows += _rows(batch, context, 3 if args.quick else args.repeats)
    shown = ("format", "batch", "context_tokens", "error", "ms", "gbps", "copy_gbps", "share", "baseline", "baseline_ms", "ratio")
    title = f"Decode on {torch.cuda.get_device_name()}, {HEADS * GROUP} query heads, {HEADS} kv heads of {DIM}, {load.ensured('cuda')}"
    print_table(title, [{key: scalar(row[key]) for key in shown} for row in rows])
    write_json(args.json, "bench ops", rows)
    return 0


def _rows(batch: int, context: int, repeats: int) -> list[dict[str, Any]]:
    generator = torch.Generator("cuda").manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, device="cuda").bfloat16()  # noqa: E731
    q, k, v = draw(batch, HEADS * GROUP, DIM), draw(batch, HEADS, context, DIM), draw(batch, HEADS, context, DIM)
    expected = _first_in_f64(q, k, v)
    runs, sizes = {}, {}
    for name in FORMATS:
        runs[name], sizes[name] = _paged(name, q, k, v)
    runs |= {name: make(q, k, v) for name, make in _baselines().items()}
    errors = {name: _error(call(), expected) for name, call in runs.items()}
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = _measure(runs | {"copy": lambda: target.copy_(source)}, repeats)
    copy_gbps = 2 * source.nbytes / median(times["copy"]) / 1e6
    common = {
        "op": "decode",
        "device": torch.cuda.get_device_name(),
        "implementation": load.ensured("cuda"),
        "group": GROUP,
        "batch": batch,
        "context_tokens": context,
        "repeats": repeats,
        "copy_gbps": copy_gbps,
    }
    rows = []
    for name in FORMATS:
        ms, gbps = median(times[name]), sizes[name] / median(times[name]) / 1e6
        for baseline in [other for other in runs if other not in FORMATS] + (["own_bf16"] if name != "bf16" else []):
            ran = "bf16" if baseline == "own_bf16" else baseline
            rows.append({
                **common, "format": name, "error": errors[name], "ms": ms, **_spread(times[name]), "bytes": sizes[name], "gbps": gbps,
                "share": gbps / copy_gbps, "tokens_per_s": 1e3 * batch / ms, "baseline": baseline, "baseline_ms": median(times[ran]),
                "baseline_error": errors[ran], "ratio": median(times[ran]) / ms,
            })  # fmt: skip
    return rows


def _paged(name: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Callable[[], Tensor], int]:
    """decode over pages of the format in random order, and the bytes it reads."""
    fmt, pages, table, seqlens = _stored(name, k, v)
    tail = {}
    if fmt.grouped:
        rows = torch.arange(len(q), dtype=torch.int32, device=q.device)
        tail = {"tail": torch.zeros(len(q), HEADS, fmt.group, DIM, dtype=torch.bfloat16, device=q.device), "tail_rows": rows}
    return lambda: ops.decode(q, pages, fmt, table, seqlens, scale=DIM**-0.5, **tail)[0], pages.nbytes


def _stored(name: str, k: Tensor, v: Tensor) -> tuple[ops.PageFormat, Tensor, Tensor, Tensor]:
    """The format, pages of it in random order, their table and lengths."""
    batch, context = k.shape[0], k.shape[2]
    keys, _, values = name.partition("/")
    fmt = ops.PageFormat(keys, HEADS, DIM, DIM, PAGE, v_name=values or None)
    per_request = context // PAGE
    pages = ops.new_pages(fmt, batch * per_request, device=k.device)
    table = torch.randperm(batch * per_request, generator=torch.Generator().manual_seed(1)).view(batch, 1, per_request).int().to(k.device)
    for r in range(batch):  # one at a time: the reference encoder works in f32
        parts = (x[r].view(HEADS, per_request, PAGE, DIM).transpose(0, 1) for x in (k, v))
        ref_formats.encode_pages(pages, fmt, table[r, 0].long(), *parts)
    return fmt, pages, table, torch.full((batch, 1), context, dtype=torch.int32, device=k.device)


def _baselines() -> dict[str, Callable[[Tensor, Tensor, Tensor], Callable[[], Tensor]]]:
    """Those that can run here; the others are named with the reason."""
    made = {"sdpa": _sdpa, "flex": _flex}
    packages = (
        ("flashinfer", "flashinfer", _flashinfer),
        ("flashinfer_in_place", "flashinfer", _flashinfer_in_place),
        ("flash_attn", "flash_attn", _flash_attn),
    )
    for name, package, make in packages:
        try:
            __import__(package)
        except ImportError as error:
            print(f"not measured: {name} ({error})")
        else:
            made[name] = make
    return made


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    return lambda: torch.nn.functional.scaled_dot_product_attention(q.unsqueeze(2), k, v, enable_gqa=True).squeeze(2)


def _flex(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention)
    return lambda: compiled(q.unsqueeze(2), k, v, enable_gqa=True).squeeze(2)


def _repaged(x: Tensor, page: int, order: Tensor) -> Tensor:
    """[B, H, L, D] as pages [B * L / page, H, page, D], page i of the sequence at order[i]."""
    pages = x.unflatten(2, (-1, page)).transpose(1, 2).flatten(0, 1)
    out = torch.empty_like(pages)
    out[order] = pages
    return out


def _flashinfer(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    import flashinfer

    batch, per_request = k.shape[0], k.shape[2] // 16
    order = torch.randperm(batch * per_request, device=q.device)
    cache = tuple(_repaged(x, 16, order) for x in (k, v))
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(torch.empty(128 << 20, dtype=torch.uint8, device=q.device), "HND")
    indptr = torch.arange(0, (batch + 1) * per_request, per_request, dtype=torch.int32, device=q.device)
    last = torch.full((batch,), 16, dtype=torch.int32, device=q.device)
    wrapper.plan(indptr, order.int(), last, HEADS * GROUP, HEADS, DIM, 16, q_data_type=q.dtype, kv_data_type=k.dtype)
    return lambda: wrapper.run(q, cache)


def _flashinfer_in_place(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    fmt, pages, table, seqlens = _stored("bf16", k, v)
    run = over_pages.prepared(q, pages, fmt, table, seqlens, scale=DIM**-0.5).run
    return lambda: run()[0]


def _flash_attn(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    from flash_attn import flash_attn_with_kvcache

    batch, context = k.shape[0], k.shape[2]
    order = torch.randperm(batch * context // 256, device=q.device)
    k_cache, v_cache = (_repaged(x, 256, order).transpose(1, 2).contiguous() for x in (k, v))
    table, lens = order.view(batch, -1).int(), torch.full((batch,), context, dtype=torch.int32, device=q.device)
    return lambda: flash_attn_with_kvcache(q.unsqueeze(1), k_cache, v_cache, cache_seqlens=lens, block_table=table).squeeze(1)


def _first_in_f64(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of the first request, [H, G, D] f64."""
    scores = torch.einsum("hgd,hld->hgl", q[0].double().view(HEADS, GROUP, DIM) * DIM**-0.5, k[0].double())
    return torch.einsum("hgl,hld->hgd", scores.softmax(-1), v[0].double())


def _error(out: Tensor, expected: Tensor) -> float:
    """Relative error norm of the first request, of the format and of the arithmetic together."""
    return ((out[0].double().view(expected.shape) - expected).norm() / expected.norm()).item()


def _measure(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """ms of each call; every call has run before (compilation, autotuning)."""
    flush = torch.empty(4 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.uint8, device="cuda")
    events = {name: [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repeats)] for name in runs}
    for i in range(repeats):
        for name, call in runs.items():
            flush.zero_()
            start, stop = events[name][i]
            start.record()
            call()
            stop.record()
    torch.cuda.synchronize()
    return {name: [start.elapsed_time(stop) for start, stop in pairs] for name, pairs in events.items()}


def _spread(ms: list[float]) -> dict[str, float]:
    fifths = quantiles(ms, n=5)
    return {"ms_p20": fifths[0], "ms_p80": fifths[3]}

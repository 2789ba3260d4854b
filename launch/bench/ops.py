"""`pikv bench ops` on the CPU: decode over pages against torch's attention, interleaved, on the same keys, values and threads.

Baselines:
    sdpa_grouped         K/V contiguous [B, H, L, D], queries of a kv head as rows of one query: the honest one; the faster of bf16, fp32
    sdpa_gqa             the same with enable_gqa=True, as one would first write it; the faster of bf16 and fp32
    dequant_sdpa         pages decoded by the torch reference, then sdpa_grouped in fp32: what compression costs without a kernel
    sdpa_on_dequantised  sdpa_grouped in fp32 on keys and values that have been decoded before the clock starts
    own_bf16             decode over bf16 pages in the same order
    first_bf16           decode over bf16 pages in order by the kernel "vnni", that of commit d67f97f; what the targets of kernels are over
    contiguous           the same decode with its pages in order; for rows with pages in random order
    stream               the time in which the same bytes are read, by a checksum of 512 MiB

`cpu_ratio` is that of the least CPU times: what a machine that others use still tells of one thread.
"""

from __future__ import annotations

import argparse
import time
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any, NamedTuple

from pikv_ds.launch.output import print_table, write_json

from .targets import judge

if TYPE_CHECKING:
    from .runs import Runs

FORMATS = ("bf16", "int8", "int4", "int2", "fp8_e4m3", "fp4_e2m1", "int8/int4", "int4/int2")  # K/V where they differ
SHAPES = ((1, 4096), (1, 32768), (8, 8192))  # batch, context
QUICK_SHAPES = ((1, 2048),)
MAX_CPU = 1.1  # CPU time beyond this share of threads x wall: more threads ran than the row says
MIN_MS = 50.0  # of one measurement: the system counts the CPU time of other threads in ticks of up to 10 ms


class Times(NamedTuple):
    """Of one call, in ms: one measurement per repeat."""

    wall: list[float]
    cpu: list[float]

    @property
    def ms(self) -> float:
        return median(self.wall)

    @property
    def cpu_ms(self) -> float:
        return median(self.cpu)

    def used(self, threads: int) -> float:
        """CPU time as a share of what `threads` threads have."""
        return sum(self.cpu) / sum(self.wall) / threads


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="one small shape, 3 repeats: does it run; judges no target")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], metavar="N", help="torch threads (default 1, then 2)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: launch/bench/ops_cuda.py (default cpu)")
    parser.add_argument("--pages-only", action="store_true", help="leaves out torch's attention: formats and precisions beside bf16")
    parser.add_argument("--repeats", type=int, default=9, metavar="N", help="runs of each, interleaved (default 9)")
    parser.add_argument(
        "--sweep", action="store_true", help="every op over formats, groups, batches, contexts, pages; launch/bench/sweep.py"
    )
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="of --sweep: no row is begun later (default: none)")


def run(args: argparse.Namespace) -> int:
    """0; 1 when a row is not valid: its CPU time says that more threads ran than were asked for."""
    shapes, repeats = (QUICK_SHAPES, 3) if args.quick else (SHAPES, args.repeats)
    rows: list[dict[str, Any]] = []
    for batch, context in shapes:
        for found in _rows(batch, context, args.threads, repeats, args.pages_only):
            rows += found
            _print(found)
    targets = judge(rows)
    if targets:
        print_table("Targets", [{key: scalar(value) for key, value in row.items()} for row in targets])
    busy = [row for row in rows if row["cpu_ms"] < 0.9 * row["ms"] and row["threads"] == 1]
    if busy:
        print(f"{len(busy)} rows of one thread had less than 90 % of their core: other work ran here")
    write_json(args.json, "bench ops", rows, targets=targets)
    invalid = [row for row in rows if not row["valid"]]
    for row in invalid:
        print(f"not valid: {row['format']} {row['pages']} and {row['baseline']} used more than {MAX_CPU} x {row['threads']} thread(s)")
    return 1 if invalid else 0


def _rows(batch: int, context: int, thread_counts: list[int], repeats: int, pages_only: bool = False):
    """One list of rows per thread count, of the same data."""
    import torch

    from pikv_ds.ops.memory import aligned_bytes

    from . import runs as bench_runs

    generator = torch.Generator().manual_seed(1)
    q = torch.randn(batch, bench_runs.HEADS * bench_runs.GROUP, bench_runs.DIM, generator=generator).bfloat16()
    runs, sizes = bench_runs.dense_runs(q, context, generator), {}
    for name in FORMATS:
        paged, sizes[name] = bench_runs.paged_runs(name, q, context, generator)
        runs |= paged
    if pages_only:
        runs = {name: call for name, call in runs.items() if "sdpa" not in name}
    data = aligned_bytes(1 << (24 if context <= 2048 else 29)).fill_(1)
    runs["stream"] = lambda: torch.ops.pikv.checksum(data)
    before = torch.get_num_threads()
    for threads in thread_counts:
        torch.set_num_threads(threads)
        times = measure(runs, repeats)
        common = {"group": bench_runs.GROUP, "batch": batch, "context": context, "threads": threads}
        fast = {f"{name} fast": sizes[name] for name in FORMATS if f"{name} fast contiguous" in runs}
        named = [*sizes.items(), *fast.items()]
        yield [row for name, nbytes in named for row in _rows_of(name, nbytes, times, common, data.nbytes)]
    torch.set_num_threads(before)


def measure(runs: Runs, repeats: int) -> dict[str, Times]:
    """All run once before, then in turns; a measurement is so many calls that it takes MIN_MS."""
    calls = {}
    for name, call in runs.items():
        call()
        started = time.perf_counter()
        call()
        calls[name] = max(1, round(MIN_MS / (1e3 * (time.perf_counter() - started))))
    times = {name: Times([], []) for name in runs}
    for _ in range(repeats):
        for name, call in runs.items():
            started, cpu_started = time.perf_counter(), time.process_time()
            for _ in range(calls[name]):
                call()
            times[name].wall.append(1e3 * (time.perf_counter() - started) / calls[name])
            times[name].cpu.append(1e3 * (time.process_time() - cpu_started) / calls[name])
    return times


def _rows_of(name: str, nbytes: int, times: dict[str, Times], common: dict[str, int], stream_bytes: int) -> list[dict[str, Any]]:
    from pikv_ds.ops.build import load

    rows, kernel = [], load.kernel("cpu")
    stream_gbps = stream_bytes / times["stream"].ms / 1e6
    for order in ("contiguous",) if name.endswith(" fast") else ("contiguous", "random"):
        own = times[f"{name} {order}"]
        for baseline, ran in _baselines(name, order, times).items():
            other = times[ran]
            share = nbytes / stream_bytes if ran == "stream" else 1.0  # of the stream: as many bytes as decode reads
            ratios = [share * b / a for a, b in zip(own.wall, other.wall, strict=True)]
            rows.append({
                "op": "decode", "format": name, **common, "ms": own.ms, "cpu_ms": own.cpu_ms,
                "baseline": baseline, "baseline_ms": share * other.ms, "ratio": share * other.ms / own.ms,
                "gbps": nbytes / own.ms / 1e6, "stream_gbps": stream_gbps, "pages": order, "baseline_ran": ran, "bytes": nbytes,
                **_spread("ms", own.wall), **_spread("ratio", ratios), "repeats": len(ratios), "kernel": kernel,
                "cpu_ms_min": min(own.cpu), "cpu_ratio": share * min(other.cpu) / min(own.cpu),
                "valid": max(x.used(common["threads"]) for x in (own, other)) <= MAX_CPU,
            })  # fmt: skip
    return rows


def _baselines(name: str, order: str, times: dict[str, Times]) -> dict[str, str]:
    """Baseline -> the run that stands for it."""
    faster = lambda kind: min((f"{kind} bf16", f"{kind} fp32"), key=lambda ran: times[ran].ms)  # noqa: E731
    found = {kind: faster(kind) for kind in ("sdpa_grouped", "sdpa_gqa") if f"{kind} bf16" in times}
    if order == "contiguous" and "bf16 first contiguous" in times:
        found["first_bf16"] = "bf16 first contiguous"
    if name.endswith(" fast"):
        return {"first_bf16": found["first_bf16"]} | {"high": f"{name.removesuffix(' fast')} contiguous", "stream": "stream"}
    if name != "bf16":
        found |= {kind: f"{kind} {name}" for kind in ("dequant_sdpa", "sdpa_on_dequantised") if f"{kind} {name}" in times}
        found["own_bf16"] = f"bf16 {order}"
    if order == "random":
        found["contiguous"] = f"{name} contiguous"
    return found | {"stream": "stream"}


def _spread(name: str, values: list[float]) -> dict[str, float]:
    fifths = quantiles(values, n=5) if len(values) > 1 else values * 4
    return {f"{name}_p20": fifths[0], f"{name}_p80": fifths[3]}


def _print(rows: list[dict[str, Any]]) -> None:
    first, shown = rows[0], ("ms", "gbps", "baseline", "baseline_ms", "ratio")
    print_table(
        f"decode, {first['batch']} x {first['context']} tokens, group {first['group']}, {first['threads']} thread(s), "
        f"stream {first['stream_gbps']:.1f} GB/s: median of {first['repeats']}, interleaved",
        [{"pages": f"{row['format']} {row['pages']}"} | {key: scalar(row[key]) for key in shown} for row in rows],
    )


def scalar(value: Any) -> Any:
    return float(f"{value:.3g}") if isinstance(value, float) else value

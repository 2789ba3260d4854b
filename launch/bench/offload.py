"""Decode steps with pages in tiers beside the same steps in memory: `python -m pikv_ds.launch.bench.offload --json FILE`.

One process, one row of each cache, the caches in turns, random queries: what is chosen changes from step to step, which is hard on staging.
A step is all layers' attend() of one token and nothing of a model, so the ratio is that of the cache alone. Columns:
    far         share of the pages that lie below
    staged      share of the chosen pages (all pages without a router) that were read in staging, each head's for itself
    missed      share of those that had to be fetched in the step; the others were there
    cpu_ms      CPU time of a step, median over steps: of the process, its threads too
    ratio       of cpu_ms, to the same reading in memory; ratio_min: of the shortest steps, on a machine that is not quiet; wall_ratio: of
                wall time
    fetched_mb  fetched per step; file_mb_s: what reading such pages of the file takes alone, with checksums (page cache of the system)
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from statistics import median, quantiles
from typing import Any

import torch

from pikv_ds.cache.cache import PiKVCache
from pikv_ds.cache.inspect import CacheProbe
from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.launch.output import print_table, write_json
from pikv_ds.spec import LayerSpec
from pikv_ds.step.step import LocalStep

PAGE, CHUNK = 16, 128


class Run:
    """One cache, grown to `tokens`."""

    def __init__(self, args: argparse.Namespace, name: str, routing: dict, offload: dict) -> None:
        self.args, self.name, self.routed, self.lens = args, name, bool(routing), 0
        self.specs = [LayerSpec(layer_idx=i, num_kv_heads=args.kv_heads, k_dim=args.dim, v_dim=args.dim) for i in range(args.layers)]
        config = PiKVConfig(page_size=PAGE, routing=routing, offload=offload)
        self.cache = PiKVCache(self.specs, config, num_experts=1, dtype=torch.bfloat16, device=torch.device("cpu"))
        self.generator, self.cpu, self.wall = torch.Generator().manual_seed(0), [], []
        while self.lens < args.tokens:
            self.forward(min(CHUNK, args.tokens - self.lens))
        self.pools = CacheProbe(self.cache).tiered
        self.marks = self.counted()

    def forward(self, num: int) -> None:
        heads = (self.args.q_heads, self.args.kv_heads, self.args.kv_heads)
        brought = [[self._random(num, n) for n in heads] for _ in self.specs]
        cpu, wall = time.process_time(), time.perf_counter()
        at = torch.arange(self.lens, self.lens + num, dtype=torch.int32).unsqueeze(0)
        fresh = self.lens == 0
        self.cache.begin_step(
            LocalStep(
                num_rows=1, num_columns=num, num_new=[num], parent=[-1 if fresh else 0], keep=[self.lens], positions=at, digest=0,
                identity=not fresh, fresh=fresh, park=None,
            )
        )  # fmt: skip
        for i, (q, k, v) in enumerate(brought):
            self.cache.attend(i, q, k, v, scale=self.args.dim**-0.5, v_dim=self.args.dim, expert_ids=None)
        self.cache.end_step()
        self.cpu.append(1e3 * (time.process_time() - cpu))
        self.wall.append(1e3 * (time.perf_counter() - wall))
        self.lens += num

    def _random(self, num: int, heads: int) -> torch.Tensor:
        return torch.randn(1, num, heads, self.args.dim, generator=self.generator).to(torch.bfloat16)

    def counted(self) -> tuple[int, int, int]:
        staged = [pool.staged for pool in self.pools]
        return sum(one.wanted for one in staged), sum(one.fetched for one in staged), sum(pool.bytes_fetched for pool in self.pools)

    def row(self, steps: int, base: Run) -> dict[str, Any]:
        cpu, wall = self.cpu[-steps:], self.wall[-steps:]
        found = {"run": self.name, "cpu_ms": median(cpu), "cpu_p20": quantiles(cpu, n=5)[0], "cpu_p80": quantiles(cpu, n=5)[3]}
        found |= {"cpu_min": min(cpu), "ratio_min": min(cpu) / min(base.cpu[-steps:])}
        found |= {"wall_ms": median(wall), "ratio": median(cpu) / median(base.cpu[-steps:])}
        found["wall_ratio"] = median(wall) / median(base.wall[-steps:])
        if not self.pools:
            return found | {"far": 0.0, "staged": 0.0, "missed": 0.0, "fetched_mb": 0.0, "file_mb_s": None}
        wanted, fetched, fetched_bytes = (now - then for now, then in zip(self.counted(), self.marks, strict=True))
        pages = self.lens // PAGE
        chosen = min(self.args.budget, pages) if self.routed else pages
        record = self.pools[0].fmt.record_bytes
        most = max(len(pool.pages) for pool in self.pools) == self.pools[0].tier.num_near + self.pools[0].tier.num_staged
        assert most, "near memory or staging has grown"
        return found | {
            "far": sum(pool.num_far for pool in self.pools) / (len(self.pools) * pages),
            "staged": wanted / (steps * len(self.pools) * chosen * (self.args.kv_heads if self.routed else 1)),
            "missed": fetched / max(1, wanted), "fetched_mb": fetched_bytes / steps / 1e6, "file_mb_s": self._bandwidth(record),
        }  # fmt: skip

    def _bandwidth(self, record: int) -> float | None:
        pool = self.pools[0]
        if not hasattr(pool.tier.store, "file"):
            return None
        used = pool.far_slots_used
        slots, out = used[torch.randperm(len(used))], torch.empty(len(used), record, dtype=torch.uint8)
        begin = time.thread_time()
        for _ in range(4):
            pool.tier.store.read(slots, out, torch.arange(len(used)))
        return 4 * len(used) * record / (time.thread_time() - begin) / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("layers", 4), ("q-heads", 16), ("kv-heads", 4), ("dim", 128), ("tokens", 8192), ("budget", 64), ("steps", 40)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--far", type=float, default=0.75, help="share of the pages that lie below (default 0.75)")
    parser.add_argument("--staging", type=float, default=2.0, help="slots of staging, in pages that a query chooses (default 2)")
    parser.add_argument("--json", default=None, metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    spec = LayerSpec(layer_idx=0, num_kv_heads=args.kv_heads, k_dim=args.dim, v_dim=args.dim)
    page = args.layers * PAGE * (spec.num_kv_heads * 2 * args.dim * 2 + 4)
    pages = args.tokens // PAGE
    sizes = {"device_gib": page * pages * (1 - args.far) * 1.02 / 2**30, "staging_mib": page * args.staging * args.budget * 1.02 / 2**20}
    routing = {"method": "bounds", "budget_pages": args.budget, "sink_tokens": 4, "recent_tokens": 64}
    with tempfile.TemporaryDirectory() as folder:
        host, file = {"host_gib": 1.0}, {"nvme_path": folder, "nvme_gib": 4.0}
        plans = [
            ("memory, chosen pages", routing, {}), ("host, chosen pages", routing, sizes | host),
            ("host, chosen pages, scores", routing, sizes | host | {"prefetch": "scores"}),
            ("file, chosen pages", routing, sizes | file), ("memory, all pages", {}, {}), ("host, all pages", {}, sizes | host),
            ("file, all pages", {}, sizes | file),
        ]  # fmt: skip
        runs = [Run(args, *plan) for plan in plans]
        for _ in range(args.steps + 2):
            for run in runs:
                run.forward(1)
            if len(runs[0].cpu) == len(runs[-1].cpu) and runs[0].lens == args.tokens + 2:
                for run in runs:
                    run.marks = run.counted()
        rows = [run.row(args.steps, runs[0] if run.routed else runs[4]) for run in runs]
    shown = ("run", "cpu_ms", "ratio", "ratio_min", "wall_ratio", "far", "staged", "missed", "fetched_mb", "file_mb_s")
    print_table(f"{args.layers} layers, {args.tokens} tokens", [{k: _short(row[k]) for k in shown} for row in rows])
    write_json(args.json, f"-m pikv_ds.launch.bench.offload {' '.join(sys.argv[1:])}".replace(args.json or "", "FILE"), rows)
    return 0


def _short(value: Any) -> Any:
    return f"{value:.3g}" if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())

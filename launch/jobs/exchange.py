"""One rank of `pikv bench exchange`. Arguments: the options as JSON, result file. Rank 0 writes the rows."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from pikv_ds.launch.ranks import gather

HEADS, GROUP, DIM, EXPERTS = 8, 4, 128, 8
WAYS = ("all", "needed", "routed")
GROWING = ("exchange_bytes_sent", "exchange_collectives", "entries_read", "entries_visible")


class Wire:
    """What leaves this rank in all-to-alls, as torch is given it: messages of queries and entries, and partials, with news of pages."""

    def __init__(self) -> None:
        self.clear()
        self.rank, self._inner = dist.get_rank(), dist.all_to_all_single
        dist.all_to_all_single = self  # of this process, which ends after the benchmark

    def __call__(self, received, block, receive, send, **more) -> Any:
        begin = 0
        for rank, size in enumerate(send):
            if rank != self.rank and block.dtype == torch.uint8:
                counts = block[begin : begin + 16].view(torch.int32)
                if counts[3]:  # of an answer (pikv_ds/exchange/answers.py)
                    news = int(counts[0] * counts[1])
                    self.news_bytes, self.partial_bytes = self.news_bytes + news, self.partial_bytes + size - news
                else:
                    self.queries, self.entries = self.queries + int(counts[0]), self.entries + int(counts[1])
            elif rank != self.rank:
                self.partial_bytes += size * block[:1].nbytes
            begin += size
        return self._inner(received, block, receive, send, **more)

    def clear(self) -> None:
        self.queries = self.entries = self.partial_bytes = self.news_bytes = 0


class Side:
    """A cache with one way of exchanging, fed with random tokens that are the same for every way."""

    def __init__(self, options: dict, case: dict, way: str, group) -> None:
        from pikv_ds.cache.cache import PiKVCache
        from pikv_ds.config.pikv import PiKVConfig
        from pikv_ds.spec import LayerSpec

        block = {"page_size": 16, "routing": case | {"exchange": way}, "storage": {"num_shards": 4, "requests": "distinct"}}
        layers = [LayerSpec(layer_idx=i, num_kv_heads=HEADS, k_dim=DIM, v_dim=DIM) for i in range(options["layers"])]
        self.cache = PiKVCache(
            layers, PiKVConfig(**block), num_experts=EXPERTS, dtype=torch.bfloat16, device=torch.device("cpu"), group=group
        )
        self.rows, self.stored = options["rows"], 0

    def forward(self, tokens: int, made: list[tuple]) -> list[torch.Tensor]:
        from pikv_ds.step.step import LocalStep

        rows, stored, outs = self.rows, self.stored, []
        positions = torch.arange(stored, stored + tokens, dtype=torch.int32).expand(rows, -1).contiguous()
        self.cache.begin_step(
            LocalStep(
                num_rows=rows, num_columns=tokens, num_new=[tokens] * rows, parent=list(range(rows)) if stored else [-1] * rows,
                keep=[stored] * rows, positions=positions, digest=0, identity=stored > 0, fresh=stored == 0,
            )
        )  # fmt: skip
        for layer, (q, k, v, ids) in enumerate(made):
            outs.append(self.cache.attend(layer, q, k, v, scale=DIM**-0.5, v_dim=DIM, expert_ids=ids).out)
        self.cache.end_step()
        self.stored += tokens
        return outs


def made_up(options: dict, tokens: int, generator: torch.Generator) -> list[tuple]:
    rows, layers = options["rows"], range(options["layers"])
    wide = lambda heads: torch.randn(rows, tokens, heads, DIM, generator=generator).bfloat16()  # noqa: E731
    ids = lambda: torch.randint(EXPERTS, (rows * tokens,), generator=generator)  # noqa: E731
    return [(wide(HEADS * GROUP), wide(HEADS), wide(HEADS), ids()) for _ in layers]


def measure(options: dict, case: dict, group, wire: Wire) -> list[dict]:
    """A row for each way, steps in turns. Bytes and counts: mean over ranks and steps; times: median over steps of the slowest rank."""
    from pikv_ds.cache.stats import stats

    generator, sides = torch.Generator().manual_seed(dist.get_rank()), {way: Side(options, case, way, group) for way in WAYS}
    for begin in range(0, options["context"], 256):
        tokens = min(256, options["context"] - begin)
        made = made_up(options, tokens, generator)
        for side in sides.values():
            side.forward(tokens, made)
    seen: dict[str, list[dict]] = {way: [] for way in WAYS}
    for step in range(options["steps"] + 2):
        first, made, outs = made_up(options, 1, generator), made_up(options, 1, generator), {}
        for way in WAYS[step % 3 :] + WAYS[: step % 3]:
            side = sides[way]
            side.forward(1, first)  # a forward that follows one of another cache says so in a frame, which is not the way's
            before = stats(side.cache, side.rows, side.stored)
            wire.clear()
            started, cpu_started = time.monotonic(), time.process_time()
            outs[way] = side.forward(1, made)
            cpu, wall = time.process_time() - cpu_started, time.monotonic() - started
            after = stats(side.cache, side.rows, side.stored)
            grown = {name: after[name] - before[name] for name in GROWING}
            query, others = HEADS * GROUP * DIM * 2, dist.get_world_size() - 1
            queries = others * options["rows"] * options["layers"] * query
            if way == "routed":  # a query, its token and the shards that it reads; a head of it, its place and the key of its last page
                queries = wire.queries * (query + 4 + 4 if case["method"] != "bounds" else query // HEADS + 4 + 8)
            seen[way].append(
                {
                    "ms": 1e3 * wall, "cpu_ms": 1e3 * cpu, "query_bytes": queries, "partial_bytes": wire.partial_bytes,
                    "news_bytes": wire.news_bytes,
                    "bytes": grown["exchange_bytes_sent"], "collectives": grown["exchange_collectives"],
                    "read": grown["entries_read"], "visible": grown["entries_visible"],
                }
            )  # fmt: skip
        assert all(torch.equal(a, b) for way in WAYS for a, b in zip(outs["all"], outs[way], strict=True)), "other outputs"
    return [{"exchange": way, **summary(gather(seen[way]))} for way in WAYS]


def summary(of_ranks: list[list[dict]]) -> dict[str, float]:
    steps = list(zip(*of_ranks, strict=True))[2:]
    mean = lambda name: sum(own[name] for step in steps for own in step) / len(steps) / len(of_ranks)  # noqa: E731
    slowest = lambda name: sorted(max(own[name] for own in step) for step in steps)  # noqa: E731
    wall = slowest("ms")
    return {name: mean(name) for name in ("bytes", "query_bytes", "partial_bytes", "news_bytes", "collectives")} | {
        "ms": median(wall), "ms_p20": wall[len(wall) // 5], "ms_p80": wall[len(wall) * 4 // 5],
        "cpu_ms": median(sorted(sum(own["cpu_ms"] for own in step) for step in steps)), "read_share": mean("read") / mean("visible"),
    }  # fmt: skip


def main(options: dict, result: Path) -> None:
    from pikv_ds.ops.build import load

    torch.set_num_threads(1)
    load.ensure("cpu")
    dist.init_process_group("gloo")
    group, wire, rows = dist.new_group(), Wire(), []
    for name, case in options["cases"].items():
        found = measure(options, case, group, wire)
        everything = found[0]["query_bytes"] + found[0]["partial_bytes"]
        for row in found:
            share = (row["query_bytes"] + row["partial_bytes"]) / everything
            rows.append({"case": name, "ranks": dist.get_world_size(), **row, "query_and_partial_share": share})
    if dist.get_rank() == 0:
        result.write_text(json.dumps(rows))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))

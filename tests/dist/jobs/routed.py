"""Queries that go only to the ranks that they read, beside those that go to all: the same bits, counted bytes as the formula says.

Argument: names of routers.
"""

import sys

import torch
import torch.distributed as dist

from pikv_ds.cache.stats import partial_bytes, routed_bytes
from pikv_ds.launch.jobs.exchange import Wire
from pikv_ds.ops.build import load
from pikv_ds.routers import ROUTERS
from tests.dist.jobs.report import Report
from tests.dist.jobs.selection import DIM, HEADS, LAYERS, SHARDS, Side, drive, forwards
from tests.long_form import LONG

BY_SUMMARY = [name for name, router in ROUTERS.items() if router.by_summary]
ROOMY = {"capacity_tokens": 4096}  # nothing spills, so that no rank needs the ids of the others first
STORAGES = {"roomy": ROOMY, "spilling": {}, "late": ROOMY | {"expert_ids": "true"}}


def checked(name: str, storage: str) -> bool:
    """Short: all storages for one router of shards and one of pages."""
    return (name, storage) != ("experts", "late") and (LONG or storage == "roomy" or name in ("topk", "bounds"))


def own_rows(group) -> list[int]:
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    return list(range(4))[rank * 4 // size : (rank + 1) * 4 // size]


def check_same_answers(report: Report, name: str, storage: str, group) -> None:
    """Prefill, chunks and decode steps, rows of padding and an idle rank among them."""
    size, own = dist.get_world_size(), own_rows(group)
    with report.check(f"{name} {storage}") as row:
        sides = {
            exchange: Side(name, "distinct", own, group, storage=STORAGES[storage], exchange=exchange) for exchange in ("all", "routed")
        }
        found = {exchange: drive(side, slice(own[0], own[-1] + 1), idle=size == 4) for exchange, side in sides.items()}
        for every, routed in zip(found["all"], found["routed"], strict=True):
            assert torch.equal(every, routed), (every - routed).abs().max()
        counts = torch.stack([torch.tensor(side.probe.read[:2], dtype=torch.float64) for side in sides.values()])
        dist.all_reduce(counts, group=group)
        assert torch.equal(counts[0], counts[1]), counts  # entries read and visible, over all ranks
        assert counts[0, 0] < counts[0, 1], counts
        row["forwards"] = forwards(sides["routed"])  # five decode steps end it; the first brings news
        assert row["forwards"] == ([5, 4] if name in BY_SUMMARY else None), row
        row |= {"bytes": {exchange: side.cache.exchange.bytes_sent for exchange, side in sides.items()}}


def check_bytes(report: Report, group) -> None:
    """A decode step: two collectives per layer and one per forward, and the bytes of the formula."""
    rank, size, own = dist.get_rank(), dist.get_world_size(), own_rows(group)
    layers = LAYERS[:1] * 2
    more = {"layers": layers, "storage": ROOMY, "sink_tokens": 0, "recent_tokens": 1}
    with report.check("bytes") as row:
        sides = {exchange: Side("topk", "distinct", own, group, exchange=exchange, **more) for exchange in ("all", "routed")}
        for side in sides.values():  # one after the other: a forward that follows one of another cache sends a frame
            side.forward(60, [60] * len(own))
            side.forward(1, [1] * len(own))
            exchange = side.cache.exchange
            sent, made = exchange.bytes_sent, exchange.collectives
            side.forward(1, [1] * len(own))
        row |= {"bytes": exchange.bytes_sent - sent, "collectives": exchange.collectives - made}
        assert row["collectives"] == 1 + 2 * len(layers), row
        # What this rank reads of whom, as the other side's choices say it.
        read = [[0] * size for _ in layers]
        for layer, request in {(key[1], key[2]) for key in sides["all"].chosen if key[0] == 2}:
            read[layer][request * size // 4] += 1
        of_all: list = [None] * size
        dist.all_gather_object(of_all, read, group=group)
        probe = sides["all"].probe
        expected = (size - 1) * (32 + 16 * -(-4 * len(own) // 16))
        for layer, spec in enumerate(layers):
            stored = [int(probe.homes(layer)[request, 61]) * size // SHARDS for request in own]
            for other in range(size):
                if other != rank:
                    queries = of_all[other][layer][rank]
                    expected += routed_bytes(len(own), queries, stored.count(other), HEADS, spec, DIM, 4, SHARDS)
                    expected += partial_bytes(read[layer][other], HEADS, DIM)
        assert row["bytes"] == expected, (row, expected)


def check_share(report: Report, group) -> None:
    """Queries and partials of decode steps that read one shard of four, those of all ranks, beside queries that go everywhere."""
    own, more = own_rows(group), {"layers": LAYERS[:1] * 2, "storage": ROOMY, "sink_tokens": 0, "recent_tokens": 1}
    with report.check("share") as row:
        side, wire, steps = Side("experts", "distinct", own, group, exchange="routed", **more), Wire(), 12
        side.forward(60, [60] * len(own))
        wire.clear()
        for _ in range(steps):
            side.forward(1, [1] * len(own))
        query, partial = HEADS * DIM * 4, partial_bytes(1, HEADS, DIM)
        sent = torch.tensor([wire.queries * (query + 4 + SHARDS) + wire.partial_bytes, 0])
        dist.all_reduce(sent, group=group)
        everywhere = steps * 2 * 4 * (dist.get_world_size() - 1) * (query + partial)
        row |= {"share": int(sent[0]) / everywhere}
        assert row["share"] <= 0.35, row


def main() -> None:
    report = Report()
    load.ensure("cpu")
    dist.init_process_group("gloo")
    group = dist.new_group()
    for name in sys.argv[1:]:
        for storage in STORAGES:
            if checked(name, storage):
                check_same_answers(report, name, storage, group)
    check_bytes(report, group)
    if dist.get_world_size() == 4:
        check_share(report, group)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

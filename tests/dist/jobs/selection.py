"""Pages chosen over several ranks, beside one rank with the same shards: the same sets, the same answers, bytes as the formula says.

Argument: names of routers. Queries, keys and values are made up, so that both sides get the same bits.
"""

import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from pikv_ds.cache.cache import PiKVCache
from pikv_ds.cache.inspect import CacheProbe
from pikv_ds.cache.stats import choice_bytes, needed_bytes, partial_bytes, stats
from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.ops.build import load
from pikv_ds.selection.budget import page_budget
from pikv_ds.spec import LayerSpec
from pikv_ds.step.step import LocalStep
from tests.dist.jobs.report import Report
from tests.routing_blocks import routing
from tests.unrotated import unrotated

FOLDER = tempfile.TemporaryDirectory(prefix="pikv_gate_")  # goes with the process
UNROTATED = ["bounds", "centroids"]  # over coefficients of keys before their rotation
SHARDS, HEADS, KV_HEADS, DIM, EXPERTS = 4, 4, 2, 16, 8
LAYERS = [
    LayerSpec(layer_idx=0, num_kv_heads=KV_HEADS, k_dim=DIM, v_dim=DIM),
    LayerSpec(layer_idx=1, num_kv_heads=KV_HEADS, k_dim=DIM, v_dim=DIM, window=20),
]


class Side:
    """A cache fed with the requests `rows` of all: row r of forward f has tokens that only r, f and the layer decide."""

    def __init__(
        self, name: str, requests: str, rows: list[int], group, compression: dict | None = None, *, layers=LAYERS, storage=None,
        timeout_s: float = 300, page_size: int = 4, scheduling: dict | None = None, **more,
    ) -> None:  # fmt: skip
        self.layers = layers
        method = routing(name, Path(FOLDER.name), layers=len(layers), shards=SHARDS, query_width=HEADS * DIM, **more)
        block = {
            "page_size": page_size,
            "scheduling": scheduling or {},
            "routing": method,
            "storage": {"num_shards": SHARDS, "requests": requests} | (storage or {}),
        }
        block |= {"compression": compression or {}, "timeout_s": timeout_s}
        self.cache = PiKVCache(
            layers, PiKVConfig(**block), num_experts=EXPERTS, dtype=torch.float32, device=torch.device("cpu"), group=group
        )
        self.rows, self.lens, self.forwards, self.chosen = rows, [0] * len(rows), 0, {}
        self.parent: list[int] = []  # of the next forward; empty: rows go on
        self.cropped = False
        self.probe = CacheProbe(self.cache)

        def look(asked, page_list):
            listed = page_list.view(*asked.visible.shape[:2], *page_list.shape[1:])  # [Q, S, H, K]
            first_row, per_row = asked.rows.start, len(asked.positions) // (asked.rows.stop - asked.rows.start)
            for query, shard, head, k in (listed >= 0).nonzero().tolist():
                key = (self.forwards, asked.layer, first_row + query // per_row, int(asked.positions[query]), head)
                place = (asked.map.local[shard], int(asked.first[query, shard, listed[query, shard, head, k]]))
                if asked.positions[query] >= 0:
                    self.chosen.setdefault(key, set()).add(place)

        if method.get("exchange") != "routed":  # then nobody sees a whole choice
            self.probe.on_choice(look)

    def fork(self, parent: list[int]) -> None:
        """In the next forward row i continues what is row parent[i] now."""
        self.parent, self.lens = parent, [self.lens[i] for i in parent]

    def crop(self, tokens: int) -> None:
        """The next forward takes back so many of every row."""
        self.lens, self.cropped = [n - tokens for n in self.lens], True

    def forward(self, columns: int, num_new: list[int]) -> list[torch.Tensor]:
        """Outputs over stored entries, per layer [B, T, HEADS, DIM]."""
        fresh, count = self.forwards == 0, len(self.rows)
        parent, self.parent = self.parent or list(range(count)), []
        index = torch.arange(columns) - columns
        positions = torch.stack([torch.where(index >= -n, length + index + n, -1) for length, n in zip(self.lens, num_new, strict=True)])
        self.cache.begin_step(
            LocalStep(
                num_rows=count, num_columns=columns, num_new=num_new, parent=[-1] * count if fresh else parent,
                keep=list(self.lens), positions=positions.to(torch.int32), digest=self.forwards, fresh=fresh,
                identity=not fresh and parent == list(range(count)) and not self.cropped,
            )
        )  # fmt: skip
        outs = []
        for layer in range(len(self.layers)):
            made = []
            for row in self.rows:
                generator = torch.Generator().manual_seed(1000 * row + 10 * self.forwards + layer)
                made.append([torch.randn(columns, heads, DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS)])
                made[-1].append(torch.randint(EXPERTS, (columns,), generator=generator))
            q, k, v, ids = (torch.stack(side) for side in zip(*made, strict=True))
            partial = self.cache.attend(layer, q, k, v, scale=0.25, v_dim=DIM, expert_ids=ids.flatten())
            outs.append(partial.out.masked_fill((positions < 0)[..., None, None], 0))
        self.cache.end_step()
        self.cropped = False
        self.lens = [length + n for length, n in zip(self.lens, num_new, strict=True)]
        self.forwards += 1
        return outs


def forwards(side: Side) -> list[int] | None:
    """How many forwards asked all ranks, and how many only those that are read; None: no rank can know."""
    numbers = stats(side.cache, len(side.rows), max(side.lens))
    return [numbers["forwards_everywhere"], numbers["forwards_routed"]] if "outline_bytes" in numbers else None


def drive(side: Side, own: slice, idle: bool) -> list[torch.Tensor]:
    """Prefill, two chunks, decoding; the requests of rank 1 pause for a step when `idle`. own: rows of this side among all."""
    outs = []
    steps = [(30, [30, 17, 9, 22]), (7, [7, 7, 4, 7]), (1, None), (5, [2, 5, 5, 1]), *[(1, None)] * 5]
    for step, (columns, num_new) in enumerate(steps):
        num_new = num_new or [1] * 4
        if idle and step == 6:
            num_new = [1, 0, 1, 1]
        outs += side.forward(columns, num_new[own])
    return outs


def check_same_pages(
    report: Report, name: str, requests: str, group, compression: dict | None = None, lone: dict | None = None, label: str = ""
) -> None:
    """compression: of the cache over the group; lone: of the one beside it, None = it stores keys as they are."""
    rank, size = dist.get_rank(), dist.get_world_size()
    with report.check(f"{name} {requests}" + f" {label}" * bool(label)) as row:
        replicated = requests == "replicated"
        per_rank = 4 // size
        own = slice(0, 4) if replicated else slice(rank * per_rank, (rank + 1) * per_rank)
        idle = not replicated and size == 4  # one request per rank
        alone, several = Side(name, "auto", list(range(4)), None, lone), Side(name, requests, list(range(4))[own], group, compression)
        expected, found = drive(alone, slice(0, 4), idle), drive(several, own, idle)
        local = several.probe.local_shards
        for key, places in alone.chosen.items():
            here = {place for place in places if place[0] in local}
            assert several.chosen.get(key, set()) == here, (key, several.chosen.get(key), here)
        extra = {key for key in several.chosen if key not in alone.chosen}
        assert not extra, sorted(extra)[:3]
        for want, got in zip(expected, found, strict=True):
            assert (want[own] - got).abs().max() < 2e-6
        read, visible, *_ = several.probe.read
        counts = torch.tensor([read, visible], dtype=torch.float64)
        dist.all_reduce(counts, group=group)
        wanted = torch.tensor(alone.probe.read[:2], dtype=torch.float64)
        assert torch.allclose(counts, wanted), (counts, wanted)
        row |= {"chosen": len(several.chosen), "read": read, "visible": visible, "requests": several.probe.mode}
        assert several.probe.mode == requests and len(alone.chosen) > 100


def check_bytes(report: Report, requests: str, group) -> None:
    """A decode step of 4 requests: what choosing adds to the collectives."""
    rank, size = dist.get_rank(), dist.get_world_size()
    with report.check(f"bytes {requests}") as row:
        rows = list(range(4)) if requests == "replicated" else list(range(4))[rank * 4 // size : (rank + 1) * 4 // size]
        side = Side("bounds", requests, rows, group)
        side.forward(40, [40] * len(rows))
        side.forward(1, [1] * len(rows))
        exchange = side.cache.exchange
        sent, made = exchange.bytes_sent, exchange.collectives
        side.forward(1, [1] * len(rows))
        seen = [[spec.tokens_kept(42)] * 4 for spec in LAYERS]
        widths = [page_budget(side.cache.config.routing, lens, 4, SHARDS, torch.device("cpu")).width for lens in seen]
        chosen = sum((size - 1) * choice_bytes(4, KV_HEADS, width) for width in widths)
        row |= {"bytes": exchange.bytes_sent - sent, "choosing": chosen, "collectives": exchange.collectives - made}
        if requests == "replicated":
            block = 32 + partial_bytes(4, HEADS, DIM)
            assert row["bytes"] == chosen + (size - 1) * (32 + len(LAYERS) * block), row
        assert row["collectives"] == (1 + 2 * len(LAYERS) if requests == "replicated" else 3 * len(LAYERS)), row


def returned_bytes(name: str, own: list[int], group, **more) -> tuple[list[torch.Tensor], int, int, int]:
    """Outputs of prefill, chunk and two decode steps; bytes of the last step, its collectives, and the blocks this rank read for others."""
    side = Side(name, "distinct", own, group, **more)
    outs = side.forward(40, [40 - row for row in own]) + side.forward(5, [5] * len(own)) + side.forward(1, [1] * len(own))
    exchange = side.cache.exchange
    sent, made = exchange.bytes_sent, exchange.collectives
    outs += side.forward(1, [1] * len(own))
    blocks = sum(key[0] == 3 and key[2] not in own for key in side.chosen)
    return outs, exchange.bytes_sent - sent, exchange.collectives - made, blocks


def check_needed(report: Report, group) -> None:
    """Partials of those that read something: the same bits, fewer bytes, as many collectives, and bytes that fall with the budget."""
    rank, size = dist.get_rank(), dist.get_world_size()
    own, base = list(range(4))[rank * 4 // size : (rank + 1) * 4 // size], {"sink_tokens": 0, "recent_tokens": 0}
    whole = len(LAYERS) * partial_bytes(4 - len(own), HEADS, DIM)  # all partials of other ranks' queries in a step
    with report.check("needed, pages") as row:
        found = []
        for pages in (1, 3, 40):
            every, needed = (
                returned_bytes("bounds", own, group, exchange=exchange, budget_pages=pages, **base) for exchange in ("all", "needed")
            )
            assert all(torch.equal(a, b) for a, b in zip(every[0], needed[0], strict=True)), "other outputs"
            assert every[2] == needed[2] == 3 * len(LAYERS)
            returned = needed_bytes(needed[3], HEADS, KV_HEADS, DIM)
            assert needed[1] == every[1] - whole + returned, (needed[1], every[1], whole, returned)
            found.append(returned)
        assert found[0] < found[1] < found[2] == whole, found
        row |= {"returned": found, "whole": whole}
    with report.check("needed, shards") as row:
        found = []
        for top_k in (1, 2, 4):
            every, needed = (
                returned_bytes("hash", own, group, exchange=exchange, top_k=top_k, **base | {"recent_tokens": 1})
                for exchange in ("all", "needed")
            )
            assert all(torch.equal(a, b) for a, b in zip(every[0], needed[0], strict=True)), "other outputs"
            assert every[2] == needed[2] == 2 * len(LAYERS)
            found.append(needed[1] - every[1] + whole)
            assert found[-1] >= needed[3] * needed_bytes(1, HEADS, 1, DIM)
        counts = torch.tensor(found)
        dist.all_reduce(counts, group=group)
        row |= {"returned": found, "whole": whole, "of_all_ranks": counts.tolist()}
        assert found[2] == whole and counts[0] <= counts[1] <= counts[2] and counts[0] < counts[2], found


def check_diverged(report: Report, group) -> None:
    """One replicated rank decodes while the others bring a chunk: all of them say so."""
    with report.check("diverged"):
        side = Side("bounds", "replicated", list(range(4)), group)
        side.forward(20, [20] * 4)
        try:
            if dist.get_rank() == 0:
                side.forward(1, [1] * 4)
            else:
                side.forward(3, [3] * 4)
        except RuntimeError as error:
            assert "differs between them" in str(error), error
        else:
            raise AssertionError("no error")


def main() -> None:
    report = Report()
    load.ensure("cpu")
    dist.init_process_group("gloo")
    group = dist.new_group()
    for requests in ("replicated", "distinct"):
        for name in sys.argv[1:]:
            check_same_pages(report, name, requests, group)
        for name in UNROTATED:
            check_same_pages(report, name, requests, group, unrotated(LAYERS, Path(FOLDER.name)), label="unrotated")
        svd = {"method": "svd", "rank": 8}
        for name in ("bounds", "centroids", "topk", "shuffle") if dist.get_world_size() == 2 else ():
            check_same_pages(report, name, requests, group, svd, svd, "svd")  # bases change with the forwards of drive()
        check_bytes(report, requests, group)
    check_needed(report, group)
    check_diverged(report, group)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
